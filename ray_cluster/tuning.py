"""The Ray job of a sweep: Ray Tune decides which trial runs when, and which is not worth going on with.

    python -m trebuchet.ray_cluster.tuning SWEEP NUMBERS          numbers as in 0-3,7

A trial is a run like any other: watched by one_node.py on the node that Tune found for it, or by driver.py where its ranks are on
several. Out of memory, failures and its record are those modules'; when its node is lost Tune starts it again elsewhere, and when it is
drained the trial saves before. Tune learns its
evaluations and may stop it early; it then saves a checkpoint and ends. What Tune keeps of its own is not needed to go on: `resume`
starts the trials that are not finished, each from its checkpoint, and a search learns from their records.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..launcher import record, sweep_budget, sweep_follow
from ..launcher.job_state import JobState
from ..launcher.plan import Plan
from ..launcher.sweep import SweepFolder
from . import between, scheduler, trials
from .one_node import NODE_VARIABLE

LOOK_S = 0.5
# Where the function of a trial over several nodes waits: on the head, which has no cores to give. Every head has this resource.
HEAD = "node:__internal_head__"


def main(root: str, numbers: str) -> int:
    sweep = SweepFolder(Path(root))
    import ray

    ray.init(address="auto", log_to_driver=False, namespace="trebuchet")
    with sweep_budget.enforced(sweep.root):
        tune_trials(sweep, numbers_of(numbers))
    print(sweep_follow.write_page(sweep))
    return 0


def tune_trials(sweep: SweepFolder, numbers: list[int]) -> None:
    from ray import tune

    from .trial_queue import TrialQueue

    facts = sweep.facts()
    # More than the cluster can ever hold at once would only make a search choose too early.
    most = min(facts["parallel"], max(trials.at_once(plan_of(sweep, number)) for number in numbers))
    tuner = tune.Tuner(
        tune.with_resources(trial, lambda config: placement(plan_of(sweep, config["number"]))),
        param_space={"sweep": str(sweep.root), "metric": facts["metric"]},
        tune_config=tune.TuneConfig(
            metric=facts["metric"],
            mode=facts["mode"],
            search_alg=TrialQueue(sweep, numbers),
            num_samples=len(numbers),
            scheduler=stopper(facts["stopping"]),
            max_concurrent_trials=most,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(sweep.root / "ray"),
            failure_config=tune.FailureConfig(max_failures=scheduler.settings_of(plan_of(sweep, numbers[0])).restarts),
            verbose=0,
        ),
    )
    tuner.fit()


def placement(plan: Plan) -> Any:
    """The placement group of a trial. Over several nodes it holds the function that waits; Ray Train asks for one for the ranks."""
    from ray import tune

    several = trials.nodes_of(plan) > 1
    return tune.PlacementGroupFactory([{HEAD: 0.001}] if several else trials.bundles(plan))


def trial(config: dict[str, Any]) -> None:
    """Tune's function: starts the run and reports its evaluations until it ends. When Tune stops it, or its driver is gone, the
    watcher hears the SIGTERM that lets a run save (between.py)."""
    import ray
    from ray import tune

    sweep = SweepFolder(Path(config["sweep"]))
    folder = sweep.trial(config["number"])
    if folder.stop.exists():  # cancelled while it waited
        record.update(folder, state=JobState.CANCELLED.value, exit_code=130, error=None)
    if folder.stop.exists() or sweep.stop.exists():
        return
    seen, told = 0, False
    several = trials.nodes_of(plan_of(sweep, config["number"])) > 1
    while not several and taken_back():  # Ray starts what ended there again before the node has gone: this ends with it
        time.sleep(LOOK_S)
    start = ["driver", str(folder.root), "--trial"] if several else ["one_node", str(folder.root)]
    command = [sys.executable, "-m", f"trebuchet.ray_cluster.{start[0]}", *start[1:]]
    # The address by name: without it Ray takes the cluster that was started last on this machine.
    here = ray.get_runtime_context()
    environment = {**os.environ, "RAY_ADDRESS": here.gcs_address, NODE_VARIABLE: here.get_node_id()}
    process = between.start(command, environment)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_S)
        rows = evaluations(folder.metrics, config["metric"])
        steps = record.read(folder)["steps"]
        for row in to_tell(rows, steps)[seen:]:
            tune.report({config["metric"]: row["value"], "percent": 100 * row["step"] / steps, "ended": False})
            seen += 1
        if process.returncode is not None:
            break
        if not several and taken_back():  # again and again: ranks that are just being started do not hear it
            told = True
            process.send_signal(signal.SIGUSR1)
    if told and record.read(folder)["state"] == JobState.PENDING:
        # To Tune the death of an actor whose node is taken back is no failure; it starts the trial elsewhere.
        os._exit(1)
    if rows:  # so that the driver can tell a trial that ended from one that Tune ended
        tune.report({config["metric"]: rows[-1]["value"], "percent": 100 * rows[-1]["step"] / steps, "ended": True})


def taken_back() -> bool:
    """Whether the node of this process is being drained: `ray drain-node`, a preempted Slurm job. As Ray Train itself asks."""
    import ray
    from ray._private import state

    return ray.get_runtime_context().get_node_id() in (state.state.get_draining_nodes() or {})


def evaluations(metrics: Path, key: str) -> list[dict[str, Any]]:
    """Steps and values of a metric, in order; a step that a resumed attempt evaluated again counts once."""
    if not metrics.exists():
        return []
    found: dict[int, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        if line.endswith("}") and isinstance((row := json.loads(line)).get(key), (int, float)):
            found[row["step"]] = row[key]
    return [{"step": step, "value": value} for step, value in sorted(found.items())]


def to_tell(rows: list[dict[str, Any]], steps: int | None) -> list[dict[str, Any]]:
    """Without the one of the last step, which is told when the trial has ended: until then it exports its model, and no rule may end
    it."""
    return [row for row in rows if row["step"] != steps]


def stopper(settings: dict[str, Any] | None) -> Any:
    """Tune's scheduler for the sweep's `stopping:` section; None runs every trial to its end. Time is the share of the trial that is
    done, in percent."""
    if settings is None:
        return None
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    grace = max(1, round(100 * settings["grace"]))
    if settings["name"] == "median":
        # No slice of time: while there are too few trials to compare with, Ray would pause one for another, which would end its ranks.
        never: Any = float("inf")
        return MedianStoppingRule(time_attr="percent", grace_period=grace, min_samples_required=2, min_time_slice=never)
    return ASHAScheduler(time_attr="percent", max_t=101, grace_period=grace, reduction_factor=settings["factor"])


def plan_of(sweep: SweepFolder, number: int) -> Plan:
    return Plan.model_validate_json(sweep.trial(number).plan.read_text(encoding="utf-8"))


def numbers_of(text: str) -> list[int]:
    """The inverse of sweep_space.ranges."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
