"""A real Slurm on this machine for the benchmarks (tests/slurm/cluster.py), and the small things that they share."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trebuchet.launcher import record
from trebuchet.launcher.job_state import JobState
from trebuchet.launcher.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def slurm_here() -> Iterator[tuple[Any, Path]]:
    """The cluster, and a folder that is gone afterwards, with the cache of tokenized data. Needs root, and slurm-wlm and munge
    (installed by apt when absent)."""
    spec = importlib.util.spec_from_file_location("slurm_cluster", ROOT / "tests/slurm/cluster.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["slurm_cluster"] = module
    spec.loader.exec_module(module)
    refused = module.install()
    if refused:
        sys.exit(refused)
    cluster = module.SlurmCluster(root=Path(tempfile.mkdtemp(prefix="slurm-")))
    with tempfile.TemporaryDirectory(prefix="slurm-bench-") as folder:
        os.environ["SLURM_CONF"] = str(cluster.root / "slurm.conf")
        os.environ["TREBUCHET_CACHE"] = f"{folder}/cache"
        try:
            cluster.start()
            yield cluster, Path(folder)
        finally:
            cluster.stop()
            shutil.rmtree(cluster.root, ignore_errors=True)


def cluster_file(folder: Path, partition: str, *, nodes: int = 1, host_memory_gib: int = 8, **slurm: Any) -> Path:
    """The cluster YAML of CPU ranks on this Slurm, one core each."""
    file = folder / f"{partition}.yaml"
    group = {"nodes": nodes, "host_memory_gib": host_memory_gib, "cores": 1}
    tree = {"scheduler": "slurm", "groups": [group], "slurm": {"partition": partition, "time": "60", **slurm}}
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def preempt(cluster: Any) -> float:
    """A job of the higher partition that wants all nodes and ends at once; the time it was handed in."""
    cluster.ask("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    return time.time()


def wait_for_step(folder: RunFolder, attempt: int, steps: int) -> float:
    """Until `attempt` (counted from 1) has done `steps` steps of its own; the time at which that was seen. Ends when the run does."""
    while True:
        found = record.read(folder)
        if JobState(found["state"]).ended:
            sys.exit(f"{folder.root} ended too early: {json.dumps(found, indent=1)}")
        last = found["attempts"][-1] if found["attempts"] else None
        begun = last is not None and len(found["attempts"]) >= attempt and not last["ended"]
        if last is not None and begun and found["step"] >= last["first_step"] + steps:
            return time.time()
        time.sleep(0.05)
