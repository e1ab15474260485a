"""The logs of all ranks of a run as one stream, each line tagged with its rank. The tag is left out when there is one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from . import api
from .run_folder import RunFolder

POLL_S = 0.2


def lines(folder: RunFolder, *, follow: bool = False) -> Iterator[str]:
    """Lines written so far; with `follow`, also those to come until the run has ended."""
    files: dict[Path, TextIO] = {}
    partial: dict[Path, str] = {}
    while True:
        ended = not follow or api.current_state(folder).ended  # asked before reading: nothing is missed after the end
        for path in sorted(folder.logs.glob("rank-*.log"), key=lambda p: int(p.stem.removeprefix("rank-"))):
            if path not in files:
                files[path] = path.open(encoding="utf-8", errors="replace")
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
