"""The keys of `data.curate` and `data.general`: what is removed from the training rows, and what is mixed in.

Left out: what the keys do (`training/data/curate/`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .schema_base import Section

Share = Annotated[float, Field(gt=0, le=1)]


class Reward(Section):
    model: str = Field(min_length=1, description="folder or Hub id of a sequence classifier with one score")
    keep: Share | None = Field(None, description="share of the rows with the best scores that stays")
    at_least: float | None = Field(None, description="lowest score that stays")
    batch: int = Field(8, ge=1, description="rows scored at a time")

    @model_validator(mode="after")
    def _one_limit(self) -> Reward:
        if (self.keep is None) == (self.at_least is None):
            raise ValueError("give keep or at_least, one of the two")
        return self


class Balance(Section):
    by: str = Field(min_length=1, description="column, or a.b inside one, whose values are balanced")
    at_most: Literal["smallest", "median"] | Annotated[int, Field(ge=1)] = Field(
        "median", description="rows that a value may keep: a number, or what the smallest or the median value has"
    )


class Curate(Section):
    """`curate: true` is all of these as they stand."""

    exact_duplicates: bool = Field(True, description="of rows with equal text, white space aside, the first stays")
    near_duplicates: Share | None = Field(
        0.7,
        description="rows as similar as this to an earlier one go: Jaccard similarity of 3-grams of words; null: none",
    )
    min_words: int = Field(0, ge=0, description="shortest answer")
    max_words: int | None = Field(None, ge=1, description="longest answer")
    max_repetition: Share | None = Field(
        0.5, description="largest share of an answer's 4-grams of words that stood in it before; null: any"
    )
    damaged: bool = Field(True, description="drop rows with mojibake, replacement or control characters")
    refusals: bool = Field(False, description="drop rows whose answer declines, in the usual English phrases")
    languages: tuple[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ...] = Field(
        (), description="ISO 639 codes to keep, told from the first 400 characters; empty: all"
    )
    rules: tuple[str, ...] = Field((), description="YAML files of rules of your own")
    function: str | None = Field(
        None,
        pattern=r"^.+:[A-Za-z_]\w*$",
        description="FILE.py:NAME or module:NAME, called with each row: false or a reason drops it; runs code of yours",
    )
    reward: Reward | None = Field(None, description="scores by a reward model: its folder, and which scores stay")
    balance: Balance | None = Field(None, description="a cap on the rows of each value of a column")
    group_similarity: Share = Field(
        0.5, description="rows as similar as this stay on one side when data.eval is a share"
    )
    leak_ngram: int = Field(8, ge=2, description="words of an n-gram in the search for leaks")
    leak_share: Share | None = Field(
        0.5, description="training rows that hold this share of a held-out row's n-grams go; null: none"
    )


def _standard(value: Any) -> Any:
    """`true` is every default, `false` is nothing."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


CurateOrNot = Annotated[Curate | None, BeforeValidator(_standard)]
