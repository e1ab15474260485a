"""The trials of a sweep as dotted keys and values: a pure function of the `sweep:` section. No clock, no file, no global state.

A trial's values depend on the sweep's seed, its own number and the key alone: more trials leave the first ones as they were, and
another key in the space does not reshuffle the others. Left out: searches that learn
from finished trials (sweep_search.py); what is drawn here is what they begin with.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from typing import Any

from .errors import ConfigError
from .schema_sweep import Sweep, Values

DIGITS = 6  # of a drawn number: what a person can read, type again and tell apart


def expand(sweep: Sweep) -> list[dict[str, Any]]:
    """One mapping per trial, in order, all different; for optuna as different as the space allows. Raises ConfigError when the space
    does not hold that many."""
    size = size_of(sweep)
    if sweep.method == "grid":
        if sweep.trials is not None and sweep.trials != size:
            raise ConfigError(
                [
                    f"sweep.trials: the grid has {size} points, not {sweep.trials}; leave trials out, or use method: random"
                ]
            )
        lists = [values.choice or () for values in sweep.space.values()]
        return [dict(zip(sweep.space, point, strict=True)) for point in itertools.product(*lists)]
    assert sweep.trials is not None
    if size is not None and sweep.trials > size and sweep.method == "random":
        raise ConfigError([f"sweep.trials: the space holds {size} different trials, and {sweep.trials} are wanted"])
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number in range(sweep.trials):
        for again in itertools.count():  # a finite space repeats itself; what was drawn before is drawn anew
            point = {path: draw(values, sweep.seed, number, again, path) for path, values in sweep.space.items()}
            if (key := json.dumps(point, sort_keys=True)) not in seen or len(seen) == size:
                found.append(point)
                seen.add(key)
                break
    return found


def startup(sweep: Sweep) -> int:
    """How many trials of a search begin without one before them: a quarter, at least 1 and at most the 10 of Optuna."""
    assert sweep.trials is not None
    return min(10, max(1, sweep.trials // 4))


def corners(sweep: Sweep) -> list[dict[str, Any]]:
    """Points that show what a key takes and what fits: each end and each choice, the other keys at their last."""
    ends = {
        path: values.choice or values.uniform or values.log_uniform or values.int_uniform or ()
        for path, values in sweep.space.items()
    }
    last = {path: values[-1] for path, values in ends.items()}
    return [last | {path: value} for path, values in ends.items() for value in values]


def size_of(sweep: Sweep) -> int | None:
    """How many different trials the space holds; None when a key has a range of real numbers."""
    size = 1
    for values in sweep.space.values():
        if values.choice is not None:
            size *= (
                len({json.dumps(value) for value in values.choice}) if sweep.method != "grid" else len(values.choice)
            )
        elif values.int_uniform is not None:
            size *= values.int_uniform[1] - values.int_uniform[0] + 1
        else:
            return None
    return size


def draw(values: Values, seed: int, number: int, again: int, path: str) -> Any:
    """One value. The hash is the random source, so that the same YAML draws the same with every Python and on every machine."""
    digest = hashlib.sha256(f"{seed}/{number}/{again}/{path}".encode()).digest()
    share = int.from_bytes(digest[:7], "big") / 2**56  # in [0, 1)
    if values.choice is not None:
        return values.choice[int(share * len(values.choice))]
    if values.int_uniform is not None:
        low, high = values.int_uniform
        return low + int(share * (high - low + 1))
    if values.log_uniform is not None:
        least, most = values.log_uniform
        return _rounded(math.exp(math.log(least) + share * (math.log(most) - math.log(least))), least, most)
    assert values.uniform is not None
    least, most = values.uniform
    return _rounded(least + share * (most - least), least, most)


def _rounded(value: float, least: float, most: float) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), least), most)


def ranges(numbers: list[int]) -> str:
    """`0-3,7,9-12`: increasing numbers as schedulers and people write them."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
