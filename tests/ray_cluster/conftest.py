"""One real Ray cluster for all tests that want one: a head and up to three nodes, all processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher.cluster import Cluster, load_cluster
from trebuchet.ray_cluster import clusters


def write_cluster(path: Path, **ray: Any) -> Cluster:
    tree = {
        "scheduler": "ray",
        "groups": [{"nodes": 3, "host_memory_gib": 16, "cores": 1}],
        "ray": {"provider": "local", "idle_s": 6, **ray},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_cluster(str(path))


@pytest.fixture(scope="session")
def ray_cluster(ray_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a cluster that is up, with no nodes yet and at most three."""
    path = tmp_path_factory.mktemp("ray") / f"test-{os.getpid()}.yaml"
    cluster = write_cluster(path, workers=[1, 3])
    clusters.up(cluster, lambda line: None)
    try:
        yield path
    finally:
        clusters.down(cluster.name, lambda line: None)


@pytest.fixture
def with_settings(ray_cluster: Path) -> Callable[..., str]:
    """The file of the same cluster with other settings of `ray:`; its name, which finds the cluster, stays."""

    def build(**ray: Any) -> str:
        write_cluster(ray_cluster, **ray)
        return str(ray_cluster)

    return build
