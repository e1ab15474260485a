"""One real Ray cluster for all tests that want one: a head and up to three nodes, all processes of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli
from trebuchet.launcher.cluster import Cluster, load_cluster
from trebuchet.launcher.record import write_atomically
from trebuchet.ray_cluster import clusters
from trebuchet.ray_cluster.state import cluster_folder

IDLE_S = 6


def write_cluster(path: Path, **ray: Any) -> Cluster:
    tree = {
        "scheduler": "ray",
        "groups": [{"nodes": 3, "host_memory_gib": 16, "cores": 1}],
        "ray": {"provider": "local", "idle_s": IDLE_S, **ray},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_cluster(str(path))


@pytest.fixture(scope="session")
def ray_cluster(ray_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a cluster that is up, with no nodes yet and at most three. It is cluster_configs/ray-autoscaling.yaml, started by its
    name as it is; then its idle nodes get less time, by the file that its autoscaler reads before each decision."""
    name = "ray-autoscaling"
    assert cli.main(["cluster", "up", name]) == 0
    try:
        shown = clusters.status(load_cluster(name))
        assert shown["up"] and shown["nodes"] == [] and (shown["least"], shown["most"]) == (0, 4)
        autoscaling = cluster_folder(name).autoscaling
        tree = yaml.safe_load(autoscaling.read_text(encoding="utf-8"))
        write_atomically(autoscaling, yaml.safe_dump(tree | {"idle_timeout_minutes": IDLE_S / 60}))
        clusters.resize(name, 3, at_most=True)
        path = tmp_path_factory.mktemp("ray") / f"{name}.yaml"
        write_cluster(path, workers=[1, 3])
        yield path
    finally:
        clusters.down(name, lambda line: None)


@pytest.fixture
def with_settings(ray_cluster: Path) -> Callable[..., str]:
    """The file of the same cluster with other settings of `ray:`; its name, which finds the cluster, stays."""

    def build(**ray: Any) -> str:
        write_cluster(ray_cluster, **ray)
        return str(ray_cluster)

    return build
