"""Schedulers by name. A module is loaded when its name is asked for, so that deciding needs none of them.

Each module has these functions:

    check(plan) -> None                 raises when the site's settings or this machine cannot take the plan; writes
    nothing
    preview(plan, folder) -> str        what `submit` hands over, byte for byte
    submit(folder, plan) -> JobHandle   hands it over and returns; the first time and to go on with a run
    reconcile(folders) -> None          brings records to what the scheduler knows; one question for all of them
    examine(cluster) -> dict            what its nodes say of themselves (training/allocation.py), waited for
    cancel(folder) -> str               asks the run to save and stop; the sentence that says what will happen

and for the trials of a sweep (sweep.py) a module with these, found by `trials`:

    preview_trials(sweep, plans, parallel) -> str    what `trebuchet sweep` hands over, byte for byte
    run_trials(sweep, numbers) -> str                starts those trials, the first time or again; the sentence that says so
    cancel_trials(sweep, folders) -> str             the same as cancel for all trials that wait or run

and for work that is cut into parts (data, evaluations) a module with this one, found by `parts`:

    parts(function, count, cluster, folder, name, gpus) -> (handle, wait)    starts function(0), function(1), … on its nodes with so many
                                                                             GPUs each; wait() gives a row for each: index, job, result,
                                                                             error
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from . import record
from .errors import SchedulerRefused
from .plan import Plan
from .run_folder import RunFolder

ROOT = __package__.rpartition(".")[0]
MODULES = {
    "local": f"{ROOT}.launcher.local",
    "slurm": f"{ROOT}.slurm.scheduler",
    "ray": f"{ROOT}.ray_cluster.scheduler",
}

TRIALS = {
    "local": f"{ROOT}.launcher.local_trials",
    "slurm": f"{ROOT}.slurm.trials",
    "ray": f"{ROOT}.ray_cluster.trials",
}


PARTS = {"slurm": f"{ROOT}.slurm.fanout", "ray": f"{ROOT}.ray_cluster.parts"}


def parts(name: str) -> Any:
    """The module that starts parts of one piece of work. Raises SchedulerRefused for a scheduler that has none."""
    if name not in PARTS:
        raise SchedulerRefused(
            f"parts of one piece of work are not sent to the scheduler '{name}', but to: {', '.join(PARTS)}. On this machine one command "
            f"does all of it; elsewhere start `trebuchet data prepare CONFIG --shards N --shard I` for each part yourself."
        )
    module: ModuleType = importlib.import_module(PARTS[name])
    return module


def trials(name: str) -> Any:
    """The module that starts the trials of a sweep. Raises SchedulerRefused for a scheduler that has none."""
    if name not in TRIALS:
        raise SchedulerRefused(f"sweeps do not run on the scheduler '{name}'; they run on: {', '.join(TRIALS)}.")
    module: ModuleType = importlib.import_module(TRIALS[name])
    return module


def backend(name: str) -> Any:
    """The module of a scheduler. Raises SchedulerRefused for one that this version plans for but does not start."""
    if name not in MODULES:
        raise SchedulerRefused(
            f"jobs of the scheduler '{name}' are planned by this version but not started; it starts: {', '.join(MODULES)}."
        )
    module: ModuleType = importlib.import_module(MODULES[name])
    return module


def of_plan(plan: Plan) -> Any:
    return backend(plan.cluster.scheduler)


def of_run(folder: RunFolder) -> Any:
    return backend(scheduler_of(record.read(folder)))


def scheduler_of(found: dict[str, Any]) -> str:
    """By the handle of the newest job of a run; local before there is one."""
    handle = found["submitted"] or (found["attempts"][-1]["handle"] if found["attempts"] else "local://")
    return str(handle).partition("://")[0]


def reconcile(folders: Iterable[RunFolder]) -> None:
    """Every record brought up to date, with one question for each scheduler."""
    by_name: dict[str, list[RunFolder]] = {}
    for folder in folders:
        by_name.setdefault(scheduler_of(record.read(folder)), []).append(folder)
    for name, those in by_name.items():
        ask: Sequence[RunFolder] = those
        backend(name).reconcile(ask)
