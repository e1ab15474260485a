"""One real Slurm for all tests that want one, and configurations that run on it; see cluster.py."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from .cluster import SlurmCluster, install

# Jobs start without the environment of the test; where the package is found by PYTHONPATH they need it.
HERE = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Four nodes with two stand-in GPUs each, and in the partition `mixed` one with A100s and one with L4s. Programs find it by
    SLURM_CONF, here and in jobs."""
    missing = install()
    if missing is not None:
        pytest.skip(missing)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 bytes
    cluster = SlurmCluster(root=root, typed=("a100", "l4"))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    # Tests that are told to end (a time limit of CI) end as by Ctrl+C: jobs outlive the daemons, and would train on.
    ended = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, ended)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_config(tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Without trackers, which take a second of each rank's start; the run past its time limit has the usual one."""

    def build(changes: Mapping[str, Any] | None = None, **top: Any) -> dict[str, Any]:
        return tiny_config({"tracking": [], **(changes or {})}, **top)

    return build


@pytest.fixture
def cluster_file(tmp_path: Path) -> Callable[..., str]:
    """The cluster YAML of CPU ranks on this Slurm, with settings of `slurm:` changed."""

    def build(nodes: int = 1, **settings: Any) -> str:
        tree = {
            "scheduler": "slurm",
            "groups": [{"nodes": nodes, "host_memory_gib": 16, "cores": 2}],
            "slurm": {"partition": "low", "time": "10", "environment": HERE, **settings},
        }
        path = tmp_path / f"cluster-{len(list(tmp_path.glob('cluster-*')))}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return str(path)

    return build
