"""The errors a user can meet, as one small tree. Each is one short paragraph: what is wrong, the limit it broke, what to change.

    TrebuchetError                exit code
    ├── UserError                 2   the input is wrong; nothing was started, nothing half-written
    │   ├── ConfigError               one or several keys of the YAML; carries all of them
    │   ├── ModelError                the model cannot be found or read
    │   ├── DataError                 a data file, a row, a template or a mask is wrong
    │   ├── ClusterError              the cluster file or this machine's inventory
    │   └── RunError                  a run folder: taken, missing, or not what it should be
    ├── NothingFits               3   no strategy fits the hardware
    ├── SchedulerRefused          4   sbatch, Ray or the local launcher said no
    └── JobFailed                 1   the job itself failed; carries the evidence

Left out: programmer errors. Those are `assert` and `TypeError`, and they come with a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class TrebuchetError(Exception):
    """Base of everything a user is told in a sentence instead of a traceback."""

    exit_code = 1


class UserError(TrebuchetError):
    exit_code = 2


class ConfigError(UserError):
    """`problems` holds every wrong key at once, each as `dotted.path: what is wrong`."""

    def __init__(self, problems: Sequence[str], source: str | None = None):
        self.problems = tuple(problems)
        self.source = source
        where = f"{source}: " if source else ""
        if len(self.problems) == 1:
            text = f"{where}{self.problems[0]}"
        else:
            text = f"{where}{len(self.problems)} problems:\n" + "\n".join(f"  {p}" for p in self.problems)
        super().__init__(text)


class ModelError(UserError):
    pass


class DataError(UserError):
    pass


class ClusterError(UserError):
    pass


class RunError(UserError):
    pass


class NothingFits(TrebuchetError):
    """Carries the `Plan` whose `feasible` is False, so that `--json` can still print it."""

    exit_code = 3

    def __init__(self, message: str, plan: Any = None):
        self.plan = plan
        super().__init__(message)


class SchedulerRefused(TrebuchetError):
    exit_code = 4


class JobFailed(TrebuchetError):
    """`node` names the machine at fault where one is, so that a scheduler can go on without it."""

    exit_code = 1

    def __init__(self, message: str, node: str | None = None):
        self.node = node
        super().__init__(message)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None when none is close (difflib ratio 0.6, case ignored)."""
    table = {c.lower(): c for c in candidates}
    hit = difflib.get_close_matches(word.lower(), list(table), n=1, cutoff=0.6)
    return table[hit[0]] if hit else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the whole list when nothing is near and it is short, or nothing."""
    candidates = sorted(set(candidates))
    hit = nearest(word, candidates)
    if hit is not None:
        return f"; did you mean '{hit}'?"
    return f"; one of: {', '.join(candidates)}" if 0 < len(candidates) <= 16 else ""
