"""Many runs of one configuration with some keys varied: planned and written together, started by the cluster's scheduler.

    SWEEP/sweep.json            the space, the values of each trial, the cluster
    SWEEP/trials/NNN/           a run like any other: `trebuchet status|logs|resume SWEEP/trials/NNN`
    SWEEP/job.sh                what was submitted, where there is one

Every check is made, and the data are tokenized once, before anything is written. Left out: the values (sweep_space.py), the table
(sweep_text.py), and how trials are started (backends.py: `trials`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from . import api, backends, record, sweep_budget
from .cluster import Cluster, load_cluster
from .config import dump_config, with_values
from .data_size import data_size
from .errors import NothingFits, RunError, UserError
from .job_state import JobState
from .model_spec import load_model_spec
from .plan import Plan
from .planner import make_plan
from .run_folder import RunFolder, new_run, require_disk
from .schema import TrainConfig
from .schema_sweep import Budget, Sweep
from .sweep_space import corners, expand, startup


@dataclass(frozen=True)
class SweepFolder:
    root: Path

    @property
    def record(self) -> Path:
        return self.root / "sweep.json"

    @property
    def script(self) -> Path:
        return self.root / "job.sh"

    @property
    def stop(self) -> Path:
        """Its presence keeps this machine from starting another trial."""
        return self.root / "stop"

    def trials(self) -> list[RunFolder]:
        return [self.trial(number) for number in range(len(self.facts()["trials"]))]

    def trial(self, number: int) -> RunFolder:
        return RunFolder(self.root / "trials" / name_of(number))

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return found


@dataclass(frozen=True)
class Planned:
    """A sweep before it is written: one plan and one mapping of values for each trial."""

    folder: SweepFolder
    config: TrainConfig
    values: tuple[dict[str, Any], ...]
    plans: tuple[Plan, ...]


def name_of(number: int) -> str:
    return f"{number:03d}"


def open_sweep(path: str) -> SweepFolder | None:
    """The sweep at a folder, or by its name below runs/; None when there is none."""
    for root in (Path(path).expanduser(), Path("runs") / path):
        if (root / "sweep.json").exists():
            return SweepFolder(root.absolute())
    return None


def plan_sweep(config: api.ConfigLike, *, cluster: str | None = None, overrides: Sequence[str] = ()) -> Planned:
    """Every trial decided; nothing is written. Raises what `plan` raises, with the trial's name."""
    checked = api.absolute(api.checked(config, overrides, cluster))
    if checked.sweep is None:
        raise UserError("the configuration has no `sweep:` section; docs/sweeps.md shows one.")
    folder = SweepFolder(new_run(checked.output).root)
    values = tuple(expand(checked.sweep))
    base = checked.model_copy(update={"sweep": None})
    configs = [
        with_values(base, {**point, "output": str(folder.trial(number).root)}, source=f"trial {name_of(number)}")
        for number, point in enumerate(values)
    ]
    plans = tuple(plan_many(configs, nodes=checked.sweep.nodes))
    refuse(checked.sweep, plans[0].cluster)
    for number, decided in enumerate(plans):
        if not decided.feasible:
            raise NothingFits(f"trial {name_of(number)}: {api.nothing_fits(decided)}", decided)
    if checked.sweep.method == "optuna":
        points = [with_values(base, point, source="sweep.space") for point in corners(checked.sweep)]
        for decided in plan_many(points, nodes=checked.sweep.nodes):
            if not decided.feasible:
                raise NothingFits(f"the end of a range of sweep.space: {api.nothing_fits(decided)}", decided)
    api.refuse_what_cannot_start(plans[0])
    for decided in {_shape(p): p for p in plans}.values():
        api.refuse_what_cannot_start(decided)
    return Planned(folder, checked, values, plans)


def refuse(sweep: Sweep, cluster: Cluster) -> None:
    """What this cluster cannot do of a sweep. Raises UserError or SchedulerRefused."""
    backends.trials(cluster.scheduler)
    if sweep.method == "optuna":
        if cluster.scheduler == "slurm":
            raise UserError(
                "sweep.method optuna learns from trials that have ended, and a Slurm array is handed in whole; use method: random, "
                "or a Ray cluster inside Slurm (cluster_configs/ray-on-slurm.yaml)."
            )
        from . import sweep_search

        sweep_search.check()
    if sweep.nodes is not None and cluster.scheduler != "ray":
        raise UserError("sweep.nodes is for Ray clusters; elsewhere a trial takes what its plan says.")
    if sweep.budget.price is not None and not any(group.price_per_gpu_hour and group.gpus for group in cluster.groups):
        raise UserError(
            f"sweep.budget.price needs GPUs with a price, and {cluster.name} has no price_per_gpu_hour; use sweep.budget.hours."
        )


def plan_many(
    configs: Sequence[TrainConfig], *, where: Cluster | None = None, nodes: int | None = None
) -> Iterator[Plan]:
    """The same for configurations that share most of their files: each model, data file and cluster is read once. `where`: a cluster
    that was read before; `nodes`: of one trial, on Ray."""
    cluster, model = cache(load_cluster), cache(load_model_spec)
    size: dict[str, Any] = {}
    for config in configs:
        data = config.data.model_dump_json()
        if data not in size:
            size[data] = data_size(config)
        seen = size[data]
        decide = partial(make_plan, config, model(config.model), examples=seen.examples, tokens=seen.tokens)
        there = where or cluster(config.cluster.name)
        # On Ray a trial takes a part of a node, as many side by side as fit.
        yield backends.trials("ray").shaped(there, decide, nodes) if there.scheduler == "ray" else decide(there)


def _shape(decided: Plan) -> tuple[Any, ...]:
    chosen = decided.chosen
    assert chosen is not None
    return (chosen.method, chosen.parallel, chosen.offload, decided.config.model)


def begin(planned: Planned) -> SweepFolder:
    """Tokenizes what the trials need, once, and writes the sweep's folder: whole, or not at all."""
    folder, prepared = planned.folder, {}
    for decided in planned.plans:
        key = _data_key(decided.config)
        if key not in prepared:
            prepared[key] = api.preflight(decided)
    require_disk(
        RunFolder(folder.root),
        sum(map(api.disk_bytes, planned.plans)),
        "the sweep (checkpoints and models of all trials)",
    )
    beside = SweepFolder(folder.root.with_name(f".{folder.root.name}.{os.getpid()}"))
    shared = {"versions": record.versions(), "git": record.git_state()}
    try:
        for number, decided in enumerate(planned.plans):
            data = prepared[_data_key(decided.config)]
            api.fill(beside.trial(number), decided, data, run=f"{folder.root.name}/{name_of(number)}", **shared)
            beside.trial(number).logs.mkdir()
        (beside.root / "train.yaml").write_text(dump_config(planned.config), encoding="utf-8")
        sweep = planned.config.sweep
        assert sweep is not None
        facts = {"sweep": folder.root.name, "created": record.now(), **sweep.model_dump(mode="json")}
        drawn = startup(sweep) if sweep.method == "optuna" else len(planned.values)
        facts |= {
            "trials": [values if number < drawn else None for number, values in enumerate(planned.values)],
            "cluster": planned.plans[0].cluster.name,
            "scheduler": planned.plans[0].cluster.scheduler,
        }
        record.write_atomically(beside.record, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        if folder.root.exists():
            folder.root.rmdir()  # it was empty when new_run looked
        os.rename(beside.root, folder.root)
    except OSError as error:
        raise RunError(f"the folder {folder.root} could not be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(beside.root, ignore_errors=True)
    return folder


def _data_key(config: TrainConfig) -> str:
    parts = (config.data, config.objective, config.model)
    return json.dumps([part.model_dump(mode="json") for part in parts]) + str(config.optimization.seed)


def start(folder: SweepFolder, numbers: Sequence[int]) -> str:
    """Hands trials to the sweep's scheduler; a sentence of what was done."""
    facts = folder.facts()
    for trial in map(folder.trial, numbers):
        if record.read(trial).get("left_out"):
            trial.stop.unlink(missing_ok=True)
            record.update(trial, left_out=None, state=JobState.PENDING.value, exit_code=None, error=None)
    said: str = backends.trials(facts["scheduler"]).run_trials(folder, list(numbers))
    if facts["stopping"] and facts["scheduler"] != "ray":
        said += "; sweep.stopping needs Ray, so every trial runs to its end"
    return said


def resume(folder: SweepFolder) -> str:
    """Goes on with what is neither finished nor on its way. Finished trials stay as they are. Raises RunError when nothing is left,
    of trials or of the budget."""
    if why := sweep_budget.used_up(folder.root):
        raise RunError(
            f"{why}; give more, such as `trebuchet resume {shlex.quote(str(folder.root))} --set sweep.budget.hours=24`."
        )
    trials = folder.trials()
    backends.reconcile(trials)
    found = [record.read(trial) for trial in trials]
    done = [is_done(facts) for facts in found]
    numbers = [n for n, facts in enumerate(found) if not done[n] and not on_its_way(facts)]
    if not numbers:
        raise RunError(
            f"{folder.root} has nothing to resume: {sum(done)} trials are finished, {len(done) - sum(done)} wait or run."
        )
    return start(folder, numbers)


def give(folder: SweepFolder, overrides: Sequence[str]) -> None:
    """A larger budget for a sweep that is to go on: `sweep.budget.hours=24`. Raises UserError for any other key."""
    facts = folder.facts()
    budget = dict(facts["budget"])
    for override in overrides:
        key, _, value = override.partition("=")
        name = key.strip().removeprefix("sweep.budget.")
        if not key.strip().startswith("sweep.budget.") or name not in Budget.model_fields:
            raise UserError(
                f"--set {key}: of a sweep only sweep.budget.hours and sweep.budget.price can be changed; for the rest name a trial, "
                f"such as {folder.trial(0).root}."
            )
        budget[name] = yaml.safe_load(value)
    try:
        facts["budget"] = Budget.model_validate(budget).model_dump(mode="json")
    except ValidationError as error:
        raise UserError(f"sweep.budget: {error.errors()[0]['msg']}") from None
    record.write_atomically(folder.record, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def is_done(facts: dict[str, Any]) -> bool:
    """Whether a trial needs nothing more: it reached its end, or was found not worth going on with."""
    return facts["state"] == JobState.SUCCEEDED or bool(facts.get("not_worth_it"))


def on_its_way(facts: dict[str, Any]) -> bool:
    """Whether a trial runs or a scheduler has it, by its record."""
    return facts["state"] == JobState.RUNNING or (facts["state"] == JobState.PENDING and facts["submitted"] is not None)


def cancel(folder: SweepFolder) -> str:
    """Trials that wait are not started, those that run save a checkpoint and stop; returns at once."""
    folder.stop.touch()
    trials = folder.trials()
    backends.reconcile(trials)
    waiting = [trial for trial in trials if on_its_way(record.read(trial))]
    for trial in waiting:
        trial.stop.touch()
    said: str = backends.trials(folder.facts()["scheduler"]).cancel_trials(folder, waiting)
    return said
