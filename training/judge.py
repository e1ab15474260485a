"""Base against tuned around a run: the same questions before and after, a verdict, and whether the base was forgotten.

Before training the base's figures and its own answers are taken; afterwards the tuned model's on the same rows. What is measured
lies in `scores.py`, `metrics.py` and `forgetting.py`, what a difference means in `verdict.py`. Left out: asking for answers side by
side (`evaluate.py`), and when it is done (`session.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..launcher.schema import Evaluation
from . import forgetting, metrics, verdict
from .data import TokenSet
from .evaluate import HeldOut, held_out_loss
from .scores import Subject, of_stepper, score, summary, text_bytes
from .step import Stepper

HEAVY = (
    "rows",
    "answers",
    "said",
    "forgetting",
)  # stay in evaluation.json; the record and metrics.jsonl hold single numbers
ONE_TOKEN_LOSS = ("sft", "pretrain")  # objectives whose held-out rows can be scored one by one


def check(settings: Evaluation) -> None:
    """Before anything is started: metrics that exist, general rows that can be read. Raises UserError or DataError."""
    for name in settings.metrics:
        metrics.find(name)
    if settings.forgetting:
        forgetting.read(settings.general)


@dataclass(frozen=True, kw_only=True)
class Judge:
    tokenizer: Any
    pad_id: int
    settings: Evaluation
    objective: str
    held_out: HeldOut

    def figures(self, stepper: Stepper) -> dict[str, Any]:
        """Of the held-out rows; collective, equal on all ranks."""
        if self.objective not in ONE_TOKEN_LOSS:
            return held_out_loss(stepper, self.held_out, self.pad_id)
        return self.of(of_stepper(stepper))

    def of(self, subject: Subject) -> dict[str, Any]:
        held = self.held_out
        found = score(subject, self._samples.sample, held.rows, micro_batch=held.micro_batch, pad_id=self.pad_id)
        return summary(found, self._bytes)

    @property
    def _samples(self) -> TokenSet:
        assert isinstance(self.held_out.units, TokenSet)  # what the objectives of ONE_TOKEN_LOSS have
        return self.held_out.units

    @cached_property
    def _bytes(self) -> list[int]:
        return text_bytes(self._samples.sample, [i for row in self.held_out.rows for i in row], self.tokenizer)

    @property
    def general(self) -> list[tuple[str, str]]:
        """None for a score model, which writes nothing."""
        return [] if self.objective == "reward" else forgetting.read(self.settings.general)[: self.settings.forgetting]

    def base_says(self, subject: Subject) -> list[dict[str, list[int]]]:
        return forgetting.ask_base(subject, self.tokenizer, [prompt for prompt, _ in self.general], self.pad_id)

    def remembers(self, subject: Subject, said: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        return forgetting.measure(subject, self.tokenizer, said, self.general, self.pad_id)

    def measure(self, stepper: Stepper, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Everything that is asked before and after; `before` is None for the base itself. Collective."""
        found = self.figures(stepper)
        if self.general:
            said = self.base_says(of_stepper(stepper)) if before is None else before.get("said")
            if said:
                found |= {"said": said, "forgetting": self.remembers(of_stepper(stepper), said)}
        return found

    def kl_nats(self, stepper: Stepper, before: Mapping[str, Any]) -> float:
        """How far the model is from its base now; for choosing a checkpoint."""
        now = self.remembers(of_stepper(stepper), before["said"])
        return float(forgetting.compare(before["forgetting"], now)["kl_nats"])

    def conclude(
        self, before: Mapping[str, Any] | None, after: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> dict[str, Any]:
        """What stands in the record under `evaluation`."""
        out: dict[str, Any] = {"before": brief(before), "after": brief(after), "verdicts": [], "verdict": None}
        found: dict[str, dict[str, Any]] = {}
        if before and "rows" in before:
            found |= verdict.of_rows(before["rows"], after["rows"])
        for name in self.settings.metrics if samples and before else ():
            answers = [[sample[who] for sample in samples] for who in ("base", "tuned")]
            worth = [metrics.values(name, texts, [sample["reference"] for sample in samples]) for texts in answers]
            found[name] = verdict.ratio(worth[0], worth[1], [1.0] * len(samples), lower_is_better=False)
        out["compared"] = found
        out["verdicts"] = [verdict.sentence(name, one) for name, one in found.items()]
        out["verdict"] = verdict.overall(found) if found else None
        if before and "forgetting" in before and "forgetting" in after:
            out["forgetting"] = forgetting.compare(before["forgetting"], after["forgetting"])
            out["forgetting"]["limit"] = self.settings.max_forgetting
        return out

    def refusal(self, concluded: Mapping[str, Any]) -> str | None:
        """Why the run fails although it trained to its end, or None."""
        limit = self.settings.max_forgetting
        if limit is None or "forgetting" not in concluded:
            return None
        return forgetting.failure(concluded["forgetting"], limit)


def brief(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if found is None else {k: v for k, v in found.items() if k not in HEAVY}


class Best:
    """The evaluation with the best figure so far, and how many came after it. The same on every rank, and in every checkpoint."""

    def __init__(self, settings: Evaluation, state: Mapping[str, Any] | None = None):
        self.name = "loss" if settings.best == "last" else settings.best
        self.patience = settings.stop_after
        self.value: float | None = (state or {}).get("value")
        self.step: int | None = (state or {}).get("step")
        self.since = int((state or {}).get("since", 0))

    def see(self, step: int, value: float) -> bool:
        """Whether this is the best so far."""
        larger = self.name == "accuracy"
        better = self.value is None or (value > self.value if larger else value < self.value)
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    @property
    def enough(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "step": self.step, "since": self.since}
