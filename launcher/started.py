"""Which ranks of an attempt have begun: each leaves a mark in the run's folder before it loads anything that takes long.

Loading torch from a file system that many nodes read at once can take minutes, on some nodes longer than on others; a rank with a mark
is slow, one without does not run. Left out: what follows (training/roll_call.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def mark(folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """A folder that cannot be written to is found, and said, by what looks at the allocation later."""
    with contextlib.suppress(OSError):
        _path(folder, int(environment.get("RANK", "0"))).write_text(_attempt(environment), encoding="utf-8")


def has_begun(folder: Path, rank: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the mark of a rank is there, and of this attempt."""
    try:
        return _path(folder, rank).read_text(encoding="utf-8") == _attempt(environment)
    except OSError:
        return False


def clear(folder: Path, rank: int) -> None:
    with contextlib.suppress(OSError):
        _path(folder, rank).unlink()


def _path(folder: Path, rank: int) -> Path:
    return folder / f".begun-{rank}"


def _attempt(environment: Mapping[str, str]) -> str:
    """A requeued job keeps its id, and Slurm counts how often it was."""
    return f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_RESTART_COUNT', '0')}"
