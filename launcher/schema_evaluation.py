"""The sections of a training YAML about looking at a run while it trains: evaluation and checkpointing.

`schema.py` holds the others and is what is imported.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from .schema_base import Section


def _share_or_steps(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("a share of the run below 1 or a whole number of steps")
    return value


BEST = ("last", "loss", "accuracy", "bits_per_byte", "margin", "kl", "general")
Every = Annotated[float, Field(gt=0), AfterValidator(_share_or_steps)]


class Evaluation(Section):
    every: Every = Field(0.1, description="share of the run when below 1, else steps, between evaluations")
    generations: int = Field(3, ge=0, description="held-out prompts answered before and after, side by side")
    max_new_tokens: int = Field(64, ge=1, description="length of those answers")
    max_rows: int | None = Field(None, ge=1, description="evaluate on this many held-out samples at most")
    metrics: tuple[str, ...] = Field(
        (), description="of the answers: exact_match, rouge, compiles, json, or a function of yours as FILE.py:FUNCTION"
    )
    forgetting: int = Field(
        8,
        ge=0,
        description="general prompts that the base answers before training, to see how far the tuned model moves; 0: none",
    )
    general: str | None = Field(
        None, description="a JSONL file of prompt and answer to use instead of the general prompts that are shipped"
    )
    max_forgetting: float | None = Field(
        None,
        gt=0,
        description="the run fails when it ends further than this from its base on those prompts, in nats a token (KL)",
    )
    best: str = Field(
        "last",
        description="which weights become the model: the last, or those of the evaluation with the best loss, accuracy, "
        "bits_per_byte, margin (of pairs), kl or general (what was forgotten), or one of metrics",
    )
    stop_after: int | None = Field(
        None, ge=1, description="stop when this many evaluations in a row bring no better figure (of best, or the loss)"
    )

    @model_validator(mode="after")
    def _forgetting_is_measured(self) -> Evaluation:
        if self.forgetting < 2 and (self.max_forgetting is not None or self.best in ("kl", "general")):
            raise ValueError(
                f"max_forgetting and best: kl or general need two general prompts at least; forgetting is {self.forgetting}"
            )
        return self

    @model_validator(mode="after")
    def _best_is_a_figure(self) -> Evaluation:
        if self.best not in BEST and self.best not in self.metrics:
            raise ValueError(f"best: {self.best} is none of {', '.join(BEST)} and not among metrics")
        if self.best in self.metrics and not self.generations:
            raise ValueError(f"best: {self.best} is a metric of answers; generations is 0")
        return self


class Checkpointing(Section):
    every: Every = Field(0.1, description="share of the run when below 1, else steps, between checkpoints")
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="keep the one with the lowest held-out loss, too")
    background: bool = Field(
        False, description="write while training goes on; costs a copy of what is saved in host memory"
    )
