"""A sweep as people and programs read it: one row per trial, best first, and what `trebuchet sweep` says before it starts.

Left out: plots (report/sweeps.py) and following a sweep (sweep_follow.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import backends, record, sweep_budget
from .job_state import JobState
from .plan_text import render as render_plan
from .run_folder import RunFolder
from .sweep import Planned, SweepFolder, name_of
from .sweep_space import startup

FINAL = {"eval_loss": "loss", "eval_perplexity": "perplexity"}  # measured once more after the last step


def table(folder: SweepFolder) -> dict[str, Any]:
    """The sweep with a row for each trial, after one question to the scheduler. Trials with a value come first, the best at the top;
    the others follow in their order."""
    backends.reconcile(folder.trials())
    return table_of_records(folder)


def table_of_records(folder: SweepFolder) -> dict[str, Any]:
    """The same by what is written, without asking anybody."""
    facts, trials = folder.facts(), folder.trials()
    rows = [_row(facts, number, trial) for number, trial in enumerate(trials)]
    sign = 1 if facts["mode"] == "min" else -1
    rows.sort(key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0), row["trial"]))
    done = [row for row in rows if row["state"] == JobState.SUCCEEDED and row["value"] is not None]
    best = folder.trial(int(done[0]["trial"])) if done else None
    counted = [JobState(row["state"]) for row in rows if not row["stopped_early"] and not row["left_out"]]
    if not done and any(row["left_out"] for row in rows):
        counted.append(JobState.CANCELLED)
    return {
        "sweep": facts["sweep"],
        "state": state_of(counted).value,
        "counts": dict(Counter(row["state"] for row in rows)),
        "metric": facts["metric"],
        "mode": facts["mode"],
        "best": done[0]["trial"] if done else None,
        "best_model": str(best.model) if best and best.model.exists() else None,
        "best_checkpoint": str(newest) if best and (newest := newest_checkpoint(best)) else None,
        "space": list(facts["space"]),
        "spent": sweep_budget.facts(folder.root),
        "trials": rows,
        "folder": str(folder.root),
    }


def entry(folder: SweepFolder) -> dict[str, Any]:
    """A sweep as one line of `trebuchet list`, by what is written: its trials stand where a run has its steps, and the best held-out
    loss where a run has the one after training."""
    found, facts = table_of_records(folder), folder.facts()
    best = next((row for row in found["trials"] if row["trial"] == found["best"]), None)
    return {
        "run": found["sweep"],
        "state": found["state"],
        "step": sum(row["state"] == JobState.SUCCEEDED or row["stopped_early"] for row in found["trials"]),
        "steps": len(found["trials"]),
        "created": facts["created"],
        "model": record.read(folder.trial(0))["model"]["name"],
        "loss_before": None,
        "loss_after": best["value"] if best and found["metric"] == "eval_loss" else None,
        "folder": str(folder.root),
        "trials": len(found["trials"]),
    }


def _row(facts: dict[str, Any], number: int, trial: RunFolder) -> dict[str, Any]:
    found = record.read(trial)
    keys = ("state", "step", "steps", "error")
    attempts = [f"{a['state']}: {a['reason']}" if a["reason"] else a["state"] for a in found["attempts"]]
    value = metric_of(trial, found, facts["metric"])
    return {"trial": name_of(number), **{key: found[key] for key in keys}, "attempts": attempts, "value": value,
            "values": facts["trials"][number] or {}, "stopped_early": bool(found.get("not_worth_it")),
            "left_out": found.get("left_out") if found["state"] == JobState.CANCELLED else None}  # fmt: skip


def newest_checkpoint(trial: RunFolder) -> Path | None:
    """The last that was written to its end."""
    there = [p for p in trial.checkpoints.glob("step-*") if (p / "manifest.json").exists()]
    return max(there, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def metric_of(trial: RunFolder, found: dict[str, Any], metric: str) -> float | None:
    """The last value of a metric: the evaluation after training where there is one, else the newest line of metrics.jsonl that has
    it."""
    after = (found.get("evaluation") or {}).get("after") or {}
    if metric in FINAL and FINAL[metric] in after:
        return float(after[FINAL[metric]])
    if not trial.metrics.exists():
        return None
    lines = reversed(trial.metrics.read_text(encoding="utf-8").splitlines())
    rows = (json.loads(line) for line in lines if line.endswith("}"))
    return next((float(row[metric]) for row in rows if isinstance(row.get(metric), (int, float))), None)


def state_of(states: Sequence[JobState]) -> JobState:
    """Of the whole: running while any trial is, done when all are, else what ended the first that did not finish."""
    for state in (JobState.RUNNING, JobState.PENDING):
        if state in states:
            return state
    return next((state for state in states if state != JobState.SUCCEEDED), JobState.SUCCEEDED)


def status(found: dict[str, Any]) -> str:
    """The table as text."""
    counts = ", ".join(f"{count} {state}" for state, count in sorted(found["counts"].items()))
    lines = [f"{found['sweep']}  {found['state']}  {counts}"]
    keys = found["space"]
    rows = [("TRIAL", "STATE", "STEP", found["metric"].upper(), *(key.rpartition(".")[2] for key in keys), "")]
    for row in found["trials"]:
        steps = f"{row['step']}/{row['steps']}" if row["steps"] else "-"
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        note = (
            "not worth going on with"
            if row["stopped_early"]
            else row["left_out"]
            or row["error"]
            or (f"attempt {len(row['attempts'])}" if len(row["attempts"]) > 1 else "")
        )
        rows.append(
            (row["trial"], row["state"], steps, value, *(_short(row["values"].get(key, "-")) for key in keys), note)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(_spent(found["spent"]))
    if found["best"]:
        lines.append(f"best so far: trial {found['best']}, {Path(found['folder']) / 'trials' / found['best']}")
        lines += [f"  {name}: {path}" for name in ("model", "checkpoint") if (path := found[f"best_{name}"])]
    return "\n".join(lines)


def _spent(spent: dict[str, Any]) -> str:
    limits = spent["limits"]
    hours = f"{spent['hours']:.2f} hours" if spent["hours"] >= 1 else f"{60 * spent['hours']:.1f} minutes"
    text = f"used: {hours}" + (f" of {limits['hours']:g} hours" if "hours" in limits else "")
    if spent["price"] or "price" in limits:
        text += f", price {spent['price']:.2f}" + (f" of {limits['price']:g}" if "price" in limits else "")
    return text


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def preview(planned: Planned) -> str:
    """The plan of the first trial, every trial's values, and what would be started."""
    sweep = planned.config.sweep
    assert sweep is not None
    lines = [render_plan(planned.plans[0])]
    for number, (values, plan) in enumerate(zip(planned.values, planned.plans, strict=True)):
        assert plan.chosen is not None
        pairs = ", ".join(f"{key}={_short(value)}" for key, value in values.items())
        if sweep.method == "optuna" and number >= startup(sweep):
            pairs = f"values that optuna draws when it starts, for example {pairs}"
        lines.append(f"trial {name_of(number)}: {pairs}  ({plan.chosen.method}, micro-batch {plan.chosen.micro_batch})")
    module = backends.trials(planned.plans[0].cluster.scheduler)
    return "\n".join([*lines, "", module.preview_trials(planned.folder, planned.plans, sweep.parallel)])
