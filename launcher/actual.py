"""Plan against actual: hours and price of a run, refreshed from its first real steps, and the time limit that follows.

The plan's range spans a factor of two, because published stacks do; twenty real steps replace it. Left out: evaluations, checkpoints
and waiting in a queue, which steps do not show (the time limit has room for them).
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass

from .plan import Plan
from .plan_text import limit
from .run_folder import RunFolder

FIRST = 20  # steps that are looked at
WARM_UP = 2  # of them left out: allocation, compilation, caches


@dataclass(frozen=True, kw_only=True)
class Actual:
    """`hours` and `price` of the whole run at the pace of its first steps; the planned ones beside them, None where unknown."""

    steps: int
    tokens_per_s: float
    hours: float
    price: float | None
    planned_tokens_per_s: float | None
    planned_hours: float | None
    planned_price: float | None
    time_limit: str


def actual(folder: RunFolder, plan: Plan, total_steps: int | None) -> Actual | None:
    """None before the third step, or where the number of steps is not known."""
    chosen = plan.chosen
    if chosen is None or not total_steps or not folder.metrics.exists():
        return None
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if line.endswith("}") if "loss" in (row := json.loads(line))]
    first = sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])[:FIRST][WARM_UP:]
    if not first:
        return None
    seconds = statistics.median(row["step_s"] for row in first)
    hours = seconds * total_steps / 3600
    group = plan.cluster.groups[0]
    per_hour = None if group.price_per_gpu_hour is None else group.price_per_gpu_hour * chosen.gpus
    return Actual(
        steps=len(first) + WARM_UP,
        tokens_per_s=sum(row["tokens"] for row in first) / sum(row["step_s"] for row in first),
        hours=hours,
        price=None if per_hour is None else hours * per_hour,
        planned_tokens_per_s=chosen.time.tokens_per_s,
        planned_hours=chosen.time.hours,
        planned_price=chosen.cost,
        time_limit=limit(hours),
    )


def lines(found: Actual) -> list[str]:
    """For `trebuchet status`."""

    def pair(planned: float | None, real: float, spell: str) -> str:
        return f"{format(real, spell)}" + ("" if planned is None else f" (planned {format(planned, spell)})")

    text = f"  after {found.steps} steps: {pair(found.planned_tokens_per_s, found.tokens_per_s, ',.0f')} tokens/s, "
    text += f"{pair(found.planned_hours, found.hours, '.2f')} h in all"
    if found.price is not None:
        text += f", price {pair(found.planned_price, found.price, ',.2f')}"
    return [text, f"  time limit that holds it: --time {found.time_limit}"]
