"""Times of Ray clusters on this machine, real Ray in every figure: nodes that come and go, a sweep against plain ray.tune, resizes.

    python benchmarks/ray.py [local] [slurm] [sweep] [elastic] [--json FILE] [--figure FILE.svg]

local, slurm  from asking for a node (a placement group) to using it, on an empty cluster; the nodes are processes or Slurm jobs
sweep         16 small trials, two at a time: ours, then plain ray.tune (ray_peer.py) with the same model, rows, steps and nodes, in turns
              with it; and from the last trial's end to no node at all
elastic       a run resized 1 -> 3 -> 2: seconds from its last new step before to its first new step after; then its driver is killed with
              -9: seconds until its ranks, its places and its nodes are gone

`slurm` needs root. Left out: GPUs, and networks between nodes; on one machine nothing travels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from trebuchet.launcher import api, record, sweep_text
from trebuchet.launcher.cluster import Cluster, load_cluster
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.launcher.sweep import open_sweep
from trebuchet.ray_cluster import clusters, rest
from trebuchet.ray_cluster.state import authentication, cluster_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]  # or this file would hide ray


def beside(path: str) -> Any:
    """A file of this repository as a module; this folder is not on the path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ray_figure = beside("benchmarks/ray_figure.py")
IDLE_S = 6.0
TRIALS, PARALLEL, STEPS, BATCH, LENGTH = 16, 2, 20, 8, 128
ASK = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
began = time.time()
group = ray.util.placement_group([{"CPU": 1}])
ray.get(group.ready())
print(time.time() - began)
"""


def a_cluster(work: Path, name: str, **settings: Any) -> Cluster:
    ray = {"provider": "local", "idle_s": IDLE_S, "workers": [1, 3], **settings.pop("ray", {})}
    tree = {"scheduler": "ray", "groups": [{"nodes": 3, "host_memory_gib": 8, "cores": 1}], "ray": ray, **settings}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return load_cluster(str(work / f"{name}.yaml"))


@contextlib.contextmanager
def up(cluster: Cluster) -> Iterator[float]:
    """A cluster that is up; the seconds that took."""
    began = time.time()
    clusters.up(cluster, lambda line: None)
    try:
        yield time.time() - began
    finally:
        clusters.down(cluster.name, lambda line: None)


def ask_for_a_node(cluster: Cluster) -> float:
    """Seconds until a placement group of one core is ready on a cluster without nodes; its asker then ends."""
    folder = cluster_folder(cluster.name)
    environment = {**os.environ, **authentication(folder.token)}
    words = [sys.executable, "-c", ASK, str(folder.read()["address"])]
    return float(subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1])


def until(condition: Callable[[], bool], timeout_s: float = 300, step_s: float = 0.1) -> float:
    began = time.time()
    while not condition():
        assert time.time() - began < timeout_s, "waited too long"
        time.sleep(step_s)
    return time.time() - began


def local(work: Path) -> dict[str, Any]:
    cluster = a_cluster(work, "bench-local")
    folder = cluster_folder(cluster.name)
    times = []
    with up(cluster) as started:
        for _ in range(2):
            times.append(ask_for_a_node(cluster))
            until(lambda: not clusters.nodes(folder))
    return {"seconds_until_up": started, "request_to_usable_node_s": times}


def slurm(work: Path) -> dict[str, Any]:
    module = beside("tests/slurm/cluster.py")
    if refused := module.install():
        return {"skipped": refused}
    site = module.SlurmCluster(root=Path(tempfile.mkdtemp(prefix="slurm-")))
    os.environ["SLURM_CONF"] = str(site.root / "slurm.conf")
    try:
        site.start()
        settings = {"partition": "low", "time": "10", "environment": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
        cluster = a_cluster(work, "bench-slurm", ray={"provider": "slurm"}, slurm=settings)
        with up(cluster) as started:
            found = {"seconds_until_up": started, "request_to_usable_node_s": [ask_for_a_node(cluster)]}
        return found | {"jobs_left": len(site.ask("squeue", "-h").split())}
    finally:
        site.stop()


def sweep(work: Path, watched: Any) -> dict[str, Any]:
    """Wall-clock of the whole command and of everything until the last trial has ended, planning and tokenizing included."""
    cluster = a_cluster(work, "bench-sweep", ray={"max_nodes": PARALLEL})
    folder = cluster_folder(cluster.name)
    rates = [1e-4 * 1.25**i for i in range(TRIALS)]
    config = configuration(work, "sweep") | {"cluster": str(work / f"{cluster.name}.yaml")}
    config["sweep"] = {
        "space": {"optimization.learning_rate": {"choice": rates}},
        "method": "grid",
        "parallel": PARALLEL,
    }
    (work / "sweep.yaml").write_text(yaml.safe_dump(config))
    with up(cluster), watched.of(cluster.name, "sweep of 16 trials, at most 2 nodes"):
        began = time.time()
        subprocess.run([sys.executable, "-m", "trebuchet.launcher.cli", "sweep", str(work / "sweep.yaml")], check=True)
        opened = open_sweep(str(work / "sweep"))
        assert opened is not None
        until(lambda: sweep_text.table(opened)["state"] not in ("PENDING", "RUNNING"), 900, 0.3)
        ours = time.time() - began
        watched.mark("last trial ended")
        until(lambda: not clusters.nodes(folder))
        zero = time.time() - began - ours
        table = sweep_text.table(opened)
        watched.mark("plain ray.tune")
        peer = plain_tune(work, folder, config, rates)
        until(lambda: not clusters.nodes(folder))
    finished = table["counts"].get("SUCCEEDED", 0)
    assert finished == TRIALS == peer["finished"], (table["counts"], peer)
    losses = sorted(row["value"] for row in table["trials"])
    return {
        "trials": TRIALS,
        "ours_s": ours,
        "plain_s": peer["seconds"],
        "ours_trials_per_hour": TRIALS / ours * 3600,
        "plain_trials_per_hour": TRIALS / peer["seconds"] * 3600,
        "ratio": peer["seconds"] / ours,
        "best_loss": {"ours": losses[0], "plain": min(peer["losses"])},
        "last_end_to_zero_nodes_s": zero,
        "idle_s_of_the_cluster": IDLE_S,
    }


def plain_tune(work: Path, folder: Any, config: dict[str, Any], rates: list[float]) -> dict[str, Any]:
    settings = {
        "address": folder.read()["address"], "model": config["model"]["name"], "train": config["data"]["train"],
        "eval": config["data"]["eval"], "max_length": LENGTH, "steps": STEPS, "batch": BATCH, "rates": rates, "parallel": PARALLEL,
        "output": str(work / "peer"), "environment": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    }  # fmt: skip
    (work / "peer.json").write_text(json.dumps(settings))
    began = time.time()
    environment = {**os.environ, **authentication(folder.token)}
    words = [sys.executable, "-P", str(Path(__file__).with_name("ray_peer.py")), str(work / "peer.json")]
    found = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[
        -1
    ]
    return json.loads(found) | {"seconds": time.time() - began}


def elastic(work: Path, watched: Any) -> dict[str, Any]:
    """And at its end `kill`: both want a run that trains."""
    cluster = a_cluster(work, "bench-elastic")
    folder, found = cluster_folder(cluster.name), {}
    endless = {
        "max_steps": 10**6,
        "global_batch_size": 24,
        "micro_batch": 1,
        "schedule": "constant",
        "learning_rate": 1e-4,
    }
    config = configuration(work, "run", optimization=endless, checkpointing={"every": 5, "keep": 2})
    with up(cluster), watched.of(cluster.name, "elastic run: 1 -> 3 -> 2 nodes, then its driver is killed"):
        clusters.resize(cluster.name, 1)
        run = RunFolder(api.submit(config, cluster=str(work / f"{cluster.name}.yaml")).folder)
        reach(run, 1)
        for size in (3, 2):
            clusters.resize(cluster.name, size)
            watched.mark(f"resize to {size}")
            found[f"to_{size}_s_without_a_new_step"] = reach(run, size)
        clusters.resize(cluster.name, 3, at_most=True)
        found["kill"] = kill(run, folder, watched)
    attempts = record.read(run)["attempts"]
    return found | {"attempts": [(a.get("world"), a["first_step"], a["last_step"], a.get("kind")) for a in attempts]}


def reach(run: RunFolder, world: int) -> float:
    """Waits for three new steps of an attempt with `world` ranks; the longest time without a new step until then."""
    furthest, last, longest = record.read(run)["step"], time.time(), 0.0
    goal = None
    while True:
        found = record.read(run)
        assert found["state"] in ("PENDING", "RUNNING"), found
        if found["step"] > furthest:
            furthest, longest, last = found["step"], max(longest, time.time() - last), time.time()
            here = found["attempts"][-1].get("world") == world and found["attempts"][-1]["ended"] is None
            goal = (goal or furthest + 3) if here else None
            if goal and furthest >= goal:
                return longest
        assert time.time() - last < 300, found
        time.sleep(0.02)


def kill(run: RunFolder, folder: Any, watched: Any) -> dict[str, float]:
    def of(module: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if module in words and str(run.root) in words:
                found.append(process)
        return found

    began = time.time()
    watched.mark("kill -9")
    for process in of("trebuchet.ray_cluster.driver"):
        if "-m" in process.info["cmdline"]:
            process.kill()
    ranks = until(lambda: not of("trebuchet.launcher.worker"))
    until(lambda: not held(folder))
    places = time.time() - began
    until(lambda: not clusters.nodes(folder))
    return {
        "ranks_gone_s": ranks,
        "places_gone_s": places,
        "nodes_gone_s": time.time() - began,
        "of_which_idle_s": IDLE_S,
    }


def held(folder: Any) -> list[Any]:
    found = rest.of_cluster(folder).ask("/api/v0/placement_groups?detail=1&limit=1000")["data"]["result"]["result"]
    return [group for group in found if group["state"] != "REMOVED"]


def configuration(work: Path, name: str, **changes: Any) -> dict[str, Any]:
    model, train, held_out = ray_figure.materials(work)
    tree: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": {"train": str(train), "eval": str(held_out), "max_length": LENGTH, "packing": False},
        "strategy": {"method": "full"},
        "optimization": {"global_batch_size": BATCH, "micro_batch": BATCH, "max_steps": STEPS},
        # As the peer does: held-out loss before and after, the model written once.
        "evaluation": {"every": STEPS, "generations": 0, "forgetting": 0},
        "checkpointing": {"every": STEPS, "keep": 1},
        "tracking": [],
        "output": str(work / name),
    }
    return tree | changes


def main(words: list[str]) -> None:
    options = {word: words[words.index(word) + 1] for word in ("--json", "--figure") if word in words}
    wanted = [w for w in words if w not in (*options, *options.values())] or ["local", "slurm", "sweep", "elastic"]
    watched, found = ray_figure.Nodes(), {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="ray-bench-") as folder:
        os.environ["TREBUCHET_CACHE"] = f"{folder}/cache"
        for name in wanted:
            work = Path(folder) / name
            work.mkdir()
            verbs: dict[str, Callable[[], Any]] = {
                "local": lambda: local(work),  # noqa: B023
                "slurm": lambda: slurm(work),  # noqa: B023
                "sweep": lambda: sweep(work, watched),  # noqa: B023
                "elastic": lambda: elastic(work, watched),  # noqa: B023
            }
            found[name] = verbs[name]() | {"load": os.getloadavg()}
            print(json.dumps({name: found[name]}, indent=1), flush=True)
            if "--json" in options:
                Path(options["--json"]).write_text(json.dumps(found, indent=1) + "\n")
            if "--figure" in options and watched.panels:
                Path(options["--figure"]).write_text(watched.svg(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
