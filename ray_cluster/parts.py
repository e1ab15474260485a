"""One piece of work in parts on a Ray cluster, as launcher/backends.py says of `parts`: a Ray job whose tasks are the parts.

    python -m trebuchet.ray_cluster.parts FOLDER        the job; FOLDER/parts.json says what to call, FOLDER/rows.json what came of it

Tasks ask for cores, so a cluster that grows on demand grows for them. What is called travels as the name of a function of ours and
plain arguments, not pickled. Left out: runs (driver.py), sweeps (trials.py).
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..launcher.cluster import Cluster
from ..launcher.record import write_atomically
from .clusters import of_ray
from .scheduler import INHERITED, dashboard_of

LOOK_S = 1.0
CORES = 4  # of a task, at most


def parts(
    function: partial[Any], count: int, cluster: Cluster, *, folder: Path, name: str, gpus: int = 0
) -> tuple[str, Callable[[], list[dict[str, Any]]]]:
    """`function` is a partial of a function of a module, with arguments that JSON can write."""
    dashboard = dashboard_of(cluster)
    call = {"module": function.func.__module__, "name": function.func.__name__, "arguments": function.args,
            "keywords": function.keywords, "count": count, "cores": min(cluster.groups[0].cores or 1, CORES),
            "gpus": gpus, "cwd": os.getcwd()}  # fmt: skip
    write_atomically(folder / "parts.json", json.dumps(call))
    handed = {key: os.environ[key] for key in INHERITED if key in os.environ} | {"HF_HUB_OFFLINE": "1"}
    job = f"{name}-{os.urandom(4).hex()}"
    words = shlex.join([sys.executable, "-m", __name__, str(folder)])
    dashboard.submit(words, job, handed | of_ray(cluster).environment, {"folder": str(folder)})

    def wait() -> list[dict[str, Any]]:
        try:
            while (known := dashboard.job(job)) is not None and known["status"] in ("PENDING", "RUNNING"):
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            dashboard.stop(job)
            raise
        if (folder / "rows.json").exists():
            rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
            return rows
        said = ((known or {}).get("message") or "no word").strip().splitlines()[-1]
        return [{"index": i, "job": job, "result": None, "error": f"the job ended early: {said}"} for i in range(count)]

    return f"ray://{cluster.name}/{job}", wait


def main(folder: Path) -> int:
    """Runs all parts as tasks and writes a row for each."""
    import ray

    call = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
    ray.init(address="auto", log_to_driver=False, namespace="trebuchet")
    task = ray.remote(num_cpus=call["cores"], num_gpus=call["gpus"], max_retries=1)(one)
    waiting = [task.remote(call, i) for i in range(call["count"])]
    rows = []
    for i, reference in enumerate(waiting):
        row: dict[str, Any] = {"index": i, "job": reference.hex(), "result": None, "error": None}
        try:
            row["result"] = ray.get(reference)
        except ray.exceptions.RayError as error:  # of the part, or of the node that it ran on
            row["error"] = str(error).strip().splitlines()[-1]
        rows.append(row)
    write_atomically(folder / "rows.json", json.dumps(rows))
    return 0


def one(call: dict[str, Any], number: int) -> Any:
    """Runs on a node, which sees the folder of the one that asked."""
    os.chdir(call["cwd"])
    function = getattr(importlib.import_module(call["module"]), call["name"])
    return function(*call["arguments"], number, **call["keywords"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
