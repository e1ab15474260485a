"""What a sweep has used of its budget, by its trials' records alone, and its end when that is used up.

Hours are those in which trials ran, however many at a time; the price is the GPU hours of all attempts by the price in the cluster
file. Plain JSON and no pydantic: each task of a Slurm array asks before it starts. Left out: guessing what a trial will use.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from . import record
from .job_state import JobState
from .run_folder import RunFolder

LOOK_S = 1.0


@dataclass(frozen=True)
class Spent:
    hours: float
    price: float


def spent(root: Path, until: datetime | None = None) -> Spent:
    """Of all attempts of all trials; one that runs counts until now."""
    price, spans = 0.0, []
    for trial in trials(root):
        attempts = [one for one in record.read(trial)["attempts"] if one.get("started")]
        rate = price_per_hour(trial) if attempts else 0.0
        for attempt in attempts:
            begun = datetime.fromisoformat(attempt["started"])
            ended = (
                datetime.fromisoformat(attempt["ended"]) if attempt["ended"] else until or datetime.now(begun.tzinfo)
            )
            spans.append((begun.timestamp(), max(begun, ended).timestamp()))
            price += rate * (spans[-1][1] - spans[-1][0]) / 3600
    return Spent(union_s(spans) / 3600, price)


def union_s(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def price_per_hour(trial: RunFolder) -> float:
    """Of all GPUs of a trial; 0 where the cluster file has no price, which a budget in price does not allow."""
    plan = json.loads(trial.plan.read_text(encoding="utf-8"))
    return float(plan["cluster"]["groups"][0].get("price_per_gpu_hour") or 0.0) * int(plan["chosen"]["gpus"])


def used_up(root: Path) -> str | None:
    """The sentence that says so; None while there is something left, or no budget."""
    budget = json.loads((root / "sweep.json").read_text(encoding="utf-8")).get("budget") or {}
    if not any(budget.values()):
        return None
    found = spent(root)
    for key, unit in (("hours", " hours"), ("price", "")):
        limit = budget.get(key)
        if limit is not None and getattr(found, key) >= limit:
            return f"sweep.budget.{key} of {limit:g}{unit} is used up"
    return None


def end_sweep(root: Path, why: str) -> None:
    """No trial starts any more, and those that run save a checkpoint and stop."""
    (root / "stop").touch()
    for trial in trials(root):
        found = record.read(trial)
        if found["state"] == JobState.RUNNING:
            record.update(trial, left_out=why)
            trial.stop.touch()
        elif found["state"] == JobState.PENDING:
            record.update(trial, left_out=why, state=JobState.CANCELLED.value, exit_code=130, error=why)


@contextlib.contextmanager
def enforced(root: Path) -> Iterator[None]:
    """Within it a thread looks every second; it goes on doing so after the end, for trials that were just about to start."""
    budget = json.loads((root / "sweep.json").read_text(encoding="utf-8")).get("budget") or {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            if why := used_up(root):
                end_sweep(root, why)

    watcher = threading.Thread(target=look, name="budget", daemon=True)
    if any(budget.values()):
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if watcher.is_alive():
            watcher.join()


def trials(root: Path) -> list[RunFolder]:
    return [RunFolder(file.parent) for file in sorted((root / "trials").glob("*/run.json"))]


def sweep_of(trial: RunFolder) -> Path | None:
    """The sweep's folder that a run is a trial of; None for any other run."""
    root = trial.root.parent.parent
    return root if trial.root.parent.name == "trials" and (root / "sweep.json").exists() else None


def facts(root: Path) -> dict[str, Any]:
    """Budget and use, for tables."""
    budget = json.loads((root / "sweep.json").read_text(encoding="utf-8")).get("budget") or {}
    found = spent(root)
    return {"hours": found.hours, "price": found.price, "limits": {k: v for k, v in budget.items() if v is not None}}
