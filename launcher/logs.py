"""The logs of all ranks of a run as one stream, each line tagged with its rank. The tag is left out when there is one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from . import api, backends, record
from .job import JobState
from .run_folder import RunFolder

POLL_S = 0.2
# A scheduler's controller serves a whole site: it is asked ever more rarely. The record is a file and read every time.
LONGEST_S = {"local": 1.0, "slurm": 30.0}


def lines(folder: RunFolder, *, follow: bool = False) -> Iterator[str]:
    """Lines written so far; with `follow`, also those to come until the run has ended."""
    files: dict[Path, TextIO] = {}
    partial: dict[Path, str] = {}
    ask_at, delay = 0.0, POLL_S
    while True:
        found = record.read(folder)  # before the logs: nothing is missed after the end
        ended = not follow or JobState(found["state"]).ended
        if not ended and time.monotonic() >= ask_at:
            ended = api.current_state(folder).ended
            delay = min(delay * 1.5, LONGEST_S.get(backends.scheduler_of(found), 30.0))
            ask_at = time.monotonic() + delay
        paths = sorted(folder.logs.glob("rank-*.log"), key=lambda p: int(p.stem.removeprefix("rank-")))
        for path in paths:
            if path not in files:
                files[path] = path.open(encoding="utf-8", errors="replace")
        for path in paths:
            text = partial.pop(path, "") + files[path].read()
            *whole, rest = text.split("\n")
            if rest and not ended:
                partial[path] = rest
            elif rest:
                whole.append(rest)
            tag = f"[{path.stem.removeprefix('rank-')}] " if len(files) > 1 else ""
            yield from (tag + line for line in whole if line.strip())
        if ended:
            break
        time.sleep(POLL_S)
    for file in files.values():
        file.close()
