"""What a report knows of a run: its folder's files, read once, with nothing missing that would stop a page from being made.

A run that never began has no metrics and no evaluation; a page of it says so. Left out: judging the numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import record
from ..errors import RunError
from ..run_folder import RunFolder, open_run

GIB = 2**30
MOST_POINTS = 2000  # of a curve; more do not fit on a screen and make a page heavy


@dataclass(frozen=True)
class Run:
    folder: RunFolder
    record: dict[str, Any]
    plan: dict[str, Any]
    steps: list[dict[str, Any]]  # lines of metrics.jsonl that are steps
    evaluations: list[dict[str, Any]]  # those that are evaluations
    figures: dict[str, Any]  # evaluation.json

    @property
    def name(self) -> str:
        return str(self.record["run"])

    @property
    def model_name(self) -> str:
        """A Hub id as it is, of a folder its last part."""
        name = str(self.record["model"]["name"])
        return Path(name).name if Path(name).is_absolute() or name.startswith(("~", ".")) else name

    @property
    def chosen(self) -> dict[str, Any]:
        return self.plan.get("chosen") or {}

    @property
    def config(self) -> dict[str, Any]:
        return self.plan.get("config") or {}

    @property
    def loss_label(self) -> str:
        """Of an axis; only the losses of language modelling have a unit."""
        kind = (self.config.get("objective") or {}).get("name", "sft")
        return "loss (nats per token)" if kind in ("sft", "pretrain") else f"loss ({kind})"

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return list(self.record["attempts"])

    @property
    def seconds(self) -> float:
        """Wall-clock time of all attempts together; one that runs counts until now."""
        return sum(attempt_seconds(one) for one in self.attempts)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * int(self.chosen.get("gpus") or 0)

    @property
    def price(self) -> float | None:
        """Per GPU and hour, of the plan's cluster."""
        groups = (self.plan.get("cluster") or {}).get("groups") or [{}]
        return groups[0].get("price_per_gpu_hour")

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.gpu_hours * self.price

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all GPUs of the run in its precision; None where the cluster file has no peak."""
        groups = (self.plan.get("cluster") or {}).get("groups") or [{}]
        precision = str(self.chosen.get("precision", "")).removesuffix("-mixed")
        peak = (groups[0].get("peak_tflops") or {}).get(precision)
        gpus = int(self.chosen.get("gpus") or 0)
        return peak * 1e12 * gpus if peak and gpus else None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOP utilisation: 6 N a token for full fine-tuning, 4 N where the base is frozen (no gradient of its weights); the
        attention's own products are left out, so long rows read a little low."""
        peak = self.peak_flops
        if not peak:
            return None
        per_token = (6 if self.chosen.get("method") == "full" else 4) * int(self.record["model"]["params"])
        return tokens_per_s * per_token / peak


def read(folder: RunFolder) -> Run:
    """Raises RunError only when run.json cannot be read."""
    steps, evaluations = metrics(folder.metrics)
    return Run(folder, record.read(folder), _json(folder.plan), thin(steps), evaluations, _json(folder.evaluation))


def metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, evaluations); a half-written last line is passed over."""
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        (steps if "loss" in values else evaluations).append(values)
    return steps, evaluations


def thin(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS, evenly, the last one always."""
    if len(steps) <= MOST_POINTS:
        return steps
    stride = len(steps) / MOST_POINTS
    return [steps[int(i * stride)] for i in range(MOST_POINTS - 1)] + [steps[-1]]


def find(names: list[str]) -> list[Run]:
    """Runs by folder or name; a folder of runs (of a sweep, say) stands for all of them. Raises RunError when there is none."""
    found: list[Run] = []
    for name in names:
        root = Path(name).expanduser()
        inside = sorted(root.glob("*/run.json")) if not (root / "run.json").exists() else []
        folders = [RunFolder(file.parent.absolute()) for file in inside] or [open_run(name)]
        found += [read(folder) for folder in folders]
    if not found:
        raise RunError("no run was named.")
    return found


def attempt_seconds(attempt: dict[str, Any]) -> float:
    begun, ended = moment(attempt.get("started")), moment(attempt.get("ended"))
    if begun is None:
        return 0.0
    return max(0.0, ((ended or datetime.now(begun.tzinfo)) - begun).total_seconds())


def moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
