"""`method: optuna`: the values of a trial are drawn when it starts, by a sampler that has seen the trials before it.

The sampler is Optuna's tree-structured Parzen estimator (https://optuna.readthedocs.io, TPESampler), built anew for each question
from the trials' records: there is no study to keep, and a sweep that is resumed goes on with what it knows. The first trials are drawn
as by `method: random`. Left out: how a trial is started; and Slurm arrays, whose trials are all handed in before one has ended.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from . import api, record, sweep_text
from .config import dump_config, with_values
from .errors import TrebuchetError, UserError
from .job_state import JobState
from .plan import Plan
from .schema_sweep import Values
from .sweep_space import _rounded

if TYPE_CHECKING:
    from .sweep import SweepFolder


@dataclass(frozen=True)
class Past:
    """A trial that was begun: its values, and the metric where there is one."""

    values: Mapping[str, Any]
    metric: float | None
    state: Literal["done", "ended early", "running"]


def check() -> None:
    if find_spec("optuna") is None:
        raise UserError("sweep.method optuna needs optuna: `pip install 'trebuchet[sweep]'`, or use method: random.")


def decide(sweep: SweepFolder, number: int) -> bool:
    """Before a trial starts: gives it values, a plan for them, and its files. True when it can start; False when its values do not
    fit, which its record then says. A trial that has values keeps them."""
    facts, trial = sweep.facts(), sweep.trial(number)
    if facts["trials"][number] is not None:
        return True
    draft = Plan.model_validate_json(trial.plan.read_text(encoding="utf-8"))
    space = {path: Values.model_validate(values) for path, values in facts["space"].items()}
    values = suggest(space, past(sweep), mode=facts["mode"], seed=facts["seed"], number=number)
    facts["trials"][number] = values
    record.write_atomically(sweep.record, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    try:
        from .sweep import plan_many

        config = with_values(draft.config, values, source=f"trial {trial.root.name}")
        plan = next(iter(plan_many([config], where=draft.cluster, nodes=facts["nodes"])))
        if not plan.feasible:
            raise UserError(api.nothing_fits(plan))
        data = api.preflight(plan) if plan.config.data != draft.config.data else None
    except TrebuchetError as problem:
        record.update(trial, state=JobState.FAILED.value, exit_code=problem.exit_code, error=str(problem))
        return False
    record.write_atomically(trial.config, dump_config(plan.config))
    record.write_atomically(trial.plan, plan.model_dump_json(indent=1) + "\n")
    model = {"name": plan.model.name, "revision": plan.model.revision, "params": plan.model.params}
    changed = {"data": data.report.to_dict()} if data else {}
    record.update(trial, seed=plan.config.optimization.seed, model=model, **changed)
    return True


def past(sweep: SweepFolder) -> list[Past]:
    """Every trial that was begun, in order; one that failed says nothing of its values."""
    facts, found = sweep.facts(), []
    for number, values in enumerate(facts["trials"]):
        trial = sweep.trial(number)
        known = record.read(trial)
        if values is None or not (known["attempts"] or known.get("not_worth_it")):
            continue
        metric = sweep_text.metric_of(trial, known, facts["metric"])
        if known.get("not_worth_it"):
            found.append(Past(values, metric, "ended early"))
        elif known["state"] == JobState.SUCCEEDED and metric is not None:
            found.append(Past(values, metric, "done"))
        elif not JobState(known["state"]).ended:
            found.append(Past(values, metric, "running"))
    return found


def suggest(space: Mapping[str, Values], past: Sequence[Past], *, mode: str, seed: int, number: int) -> dict[str, Any]:
    """Values for the next trial; a pure function of what is given. Trials that run count as poor ones where they are
    (`constant_liar`), so that several at a time do not try the same."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"), n_startup_trials=1, constant_liar=True)
    direction: Literal["minimize", "maximize"] = "minimize" if mode == "min" else "maximize"
    study = optuna.create_study(direction=direction, sampler=sampler)
    distributions = {path: distribution(values) for path, values in space.items()}
    for one in past:
        study.add_trial(frozen(optuna, space, distributions, one))
    drawn = study.ask(distributions).params
    return {path: plain(values, drawn[path]) for path, values in space.items()}


def frozen(optuna: Any, space: Mapping[str, Values], distributions: dict[str, Any], one: Past) -> Any:
    states = optuna.trial.TrialState
    state = {"done": states.COMPLETE, "ended early": states.PRUNED, "running": states.RUNNING}[one.state]
    params = {path: inner(values, one.values[path]) for path, values in space.items()}
    seen = {1: one.metric} if one.state == "ended early" and one.metric is not None else {}
    value = one.metric if one.state == "done" and one.metric is not None and math.isfinite(one.metric) else None
    if one.state == "done" and value is None:  # a loss that is not a number: tried, and no good
        state = states.PRUNED
    return optuna.trial.create_trial(
        state=state, params=params, distributions=distributions, value=value, intermediate_values=seen
    )


def distribution(values: Values) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choice is not None:
        return CategoricalDistribution(range(len(values.choice)))  # by place: a choice may be a list
    if values.int_uniform is not None:
        return IntDistribution(*values.int_uniform)
    if values.log_uniform is not None:
        return FloatDistribution(*values.log_uniform, log=True)
    assert values.uniform is not None
    return FloatDistribution(*values.uniform)


def plain(values: Values, drawn: Any) -> Any:
    """What Optuna drew as the YAML would say it."""
    if values.choice is not None:
        return values.choice[drawn]
    ends = values.log_uniform or values.uniform
    return drawn if ends is None else _rounded(float(drawn), *ends)


def inner(values: Values, value: Any) -> Any:
    """The inverse of `plain`. JSON has made lists of tuples."""
    if values.choice is None:
        return value
    return next(i for i, one in enumerate(values.choice) if json.dumps(one) == json.dumps(value))
