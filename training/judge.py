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

from ..launcher.errors import UserError
from ..launcher.schema import Evaluation
from . import forgetting, metrics, verdict
from .data import TokenSet
from .evaluate import HeldOut, answers, held_out_loss
from .objectives import Objective
from .scores import Subject, score, summary, text_bytes

HEAVY = (
    "rows",
    "answers",
    "said",
    "forgetting",
)  # stay in evaluation.json; the record and metrics.jsonl hold single numbers
SMALLER = (
    "loss",
    "bits_per_byte",
    "kl",
    "general",
)  # figures that are better when smaller; all others are shares and margins
ONE_TOKEN_LOSS = ("sft", "pretrain")  # objectives whose held-out rows can be scored one by one


def check(settings: Evaluation, objective: str) -> None:
    """Before anything is started: metrics that exist, a best figure that the objective has, general rows that can be read. Raises
    UserError or DataError."""
    for name in settings.metrics:
        metrics.find(name)
    has = {"last", "loss", "accuracy", "kl", "general", *settings.metrics}
    has |= {"bits_per_byte"} if objective in ONE_TOKEN_LOSS else {"margin"}
    has -= {"kl", "general", *settings.metrics} if objective == "reward" else set()  # a score model writes nothing
    if settings.best not in has:
        raise UserError(
            f"evaluation.best: {settings.best} is no figure of the objective {objective}; it has {', '.join(sorted(has))}."
        )
    if settings.forgetting and len(forgetting.read(settings.general)) < 2:
        raise UserError(f"evaluation.general: {settings.general} needs two prompts at least, for an interval.")


@dataclass(frozen=True, kw_only=True)
class Judge:
    tokenizer: Any
    pad_id: int
    settings: Evaluation
    objective: str
    rule: Objective  # what that name stands for
    held_out: HeldOut

    def figures(self, subject: Subject) -> dict[str, Any]:
        """Of the held-out rows; collective, equal on all ranks."""
        held = self.held_out
        if self.objective not in ONE_TOKEN_LOSS:
            return held_out_loss(subject, self.rule, held, self.pad_id)
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

    def measure(self, subject: Subject, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Everything that is asked before and after; `before` is None for the base itself. Collective."""
        found = self.figures(subject)
        if self.general:
            said = self.base_says(subject) if before is None else before.get("said")
            if said:
                found |= {"said": said, "forgetting": self.remembers(subject, said)}
        return found

    def on_the_way(self, subject: Subject, before: Mapping[str, Any] | None) -> dict[str, float]:
        """Figures of an evaluation while it trains, with the one that chooses the weights, which may cost answers. Collective."""
        found = brief(self.figures(subject)) or {}
        best = self.settings.best
        if best in ("kl", "general") and before:
            now = forgetting.compare(before["forgetting"], self.remembers(subject, before["said"]))
            found |= {"kl": float(now["kl_nats"]), "general": float(now["general"]["after"])}
        if best in self.settings.metrics:
            found[best] = self.task(subject, best)
        return found

    def task(self, subject: Subject, name: str) -> float:
        """Mean of a metric over the answers to the held-out prompts; asked on rank 0, or on all where a forward takes all."""
        prompts, worth = self.held_out.prompts(self.settings.generations), [0.0]
        if subject.rank == 0 or subject.together:
            texts = answers(subject, self.tokenizer, prompts, self.settings.max_new_tokens)
            if subject.rank == 0:
                decode = lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()  # noqa: E731
                worth = metrics.values(name, texts, [decode(reference) for _, reference in prompts])
        return float(subject.total(sum(worth) / len(worth))[0])

    def conclude(
        self, before: Mapping[str, Any] | None, after: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
    ) -> dict[str, Any]:
        """What stands in the record under `evaluation`."""
        out: dict[str, Any] = {"before": brief(before), "after": brief(after), "verdicts": [], "verdict": None}
        found: dict[str, dict[str, Any]] = {}
        if before and "rows" in before:
            of = verdict.of_rows if self.objective in ONE_TOKEN_LOSS else verdict.of_pairs
            found |= of(before["rows"], after["rows"])
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
            out["verdicts"].append(verdict.sentence("loss on general text", out["forgetting"]["general"]))
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
        larger = self.name not in SMALLER
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
