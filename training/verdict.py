"""Better, worse, or not distinguishable: paired bootstrap over the held-out rows.

Both models are asked the same rows, so rows are drawn with replacement and both models' sums are taken over the same draw
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Koehn 2004 for the paired use). The interval is the middle 95 % of
the differences; a verdict is spoken only when it leaves out zero. Left out: several comparisons at once, which 95 % does not cover.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAWS, SEED, LEVEL = 2000, 0, 0.95
BETTER, WORSE, SAME = "better", "worse", "not distinguishable"


def ratio(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float], *, lower_is_better: bool
) -> dict[str, Any]:
    """Sums over rows divided by the sum of `weights` (tokens, bytes, or ones), after minus before, with interval and verdict."""
    a, b, w = (np.asarray(column, dtype=np.float64) for column in (before, after, weights))
    keep = w > 0
    a, b, w = a[keep], b[keep], w[keep]
    if len(w) < 2:
        return {
            "before": None,
            "after": None,
            "difference": None,
            "low": None,
            "high": None,
            "rows": len(w),
            "verdict": SAME,
        }
    draws = np.random.default_rng(SEED).multinomial(len(w), np.full(len(w), 1 / len(w)), size=DRAWS)
    differences = (draws @ (b - a)) / (draws @ w)
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    side = SAME if low <= 0 <= high else BETTER if (high < 0) == lower_is_better else WORSE
    return {
        "before": float(a.sum() / w.sum()),
        "after": float(b.sum() / w.sum()),
        "difference": float((b - a).sum() / w.sum()),
        "low": float(low),
        "high": float(high),
        "rows": len(w),
        "verdict": side,
    }


def of_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """loss, accuracy and bits_per_byte of two models on the same rows, as `scores.summary` gives them."""
    assert before["sample"] == after["sample"], "the two models were asked different rows"
    bits = [np.asarray(x["loss"]) / np.log(2) for x in (before, after)]
    return {
        "loss": ratio(before["loss"], after["loss"], before["tokens"], lower_is_better=True),
        "accuracy": ratio(before["correct"], after["correct"], before["tokens"], lower_is_better=False),
        "bits_per_byte": ratio(bits[0].tolist(), bits[1].tolist(), before["bytes"], lower_is_better=True),
    }


def of_pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Accuracy, and margin where a row has two sides, of two models on the same held-out pairs, as `held_out_loss` gives them. A
    tie counts half, so a model that has not moved from its reference stands at one half."""
    assert before["sample"] == after["sample"], "the two models were asked different pairs"
    names = [name for name in before if name != "sample"]
    ones = [1.0] * len(before["sample"])
    return {name: ratio(before[name], after[name], ones, lower_is_better=False) for name in names}


def sentence(name: str, found: Mapping[str, Any]) -> str:
    if found["difference"] is None:
        return f"{name}: too few rows to compare"
    return (
        f"{name.replace('_', ' ')} {found['before']:.4g} -> {found['after']:.4g}: {found['verdict']} "
        f"({found['difference']:+.3g}, 95% between {found['low']:+.3g} and {found['high']:+.3g}, {found['rows']} rows)"
    )


def overall(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """That of the loss, which training lowers and every row has; of pairs, whose losses of different objectives say little, that of
    the accuracy."""
    first = next((name for name in ("loss", "accuracy") if name in verdicts), None)
    return str(verdicts[first]["verdict"]) if first else SAME
