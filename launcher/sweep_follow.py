"""A sweep while it runs: its table, drawn again when something has changed, and the page with its figures at the end.

On a terminal the table is drawn over itself; into a file or a pipe only rows that changed are written. Left out: what is in the table
(sweep_text.py) and on the page (report/sweeps.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from . import sweep, sweep_text
from .errors import UserError
from .sweep import SweepFolder

LOOK_S = 2.0


def until_the_end(folder: SweepFolder, out: TextIO) -> dict[str, Any]:
    """The same as `follow`, for the command that started the sweep: the first Ctrl+C cancels it, so that trials save and give their
    nodes back, and the table is followed to that end."""
    try:
        return follow(folder, out)
    except KeyboardInterrupt:
        print(
            f"\nthe sweep {sweep.cancel(folder)}; `trebuchet resume {folder.root}` goes on. Ctrl+C again leaves now.",
            file=sys.stderr,
        )
        return follow(folder, out)


def follow(folder: SweepFolder, out: TextIO) -> dict[str, Any]:
    """Until no trial waits or runs; the last table."""
    shown: list[str] = []
    while True:
        found = sweep_text.table(folder)
        lines = sweep_text.status(found).splitlines()
        if lines != shown:
            out.write(drawn(shown, lines, over=out.isatty()))
            out.flush()
            shown = lines
        if found["state"] not in ("PENDING", "RUNNING"):
            return found
        time.sleep(LOOK_S)


def drawn(before: list[str], lines: list[str], *, over: bool) -> str:
    """What to write so that a reader who has seen `before` sees `lines`."""
    if over:
        up = f"\x1b[{len(before)}F\x1b[J" if before else ""  # to the first line of the old table, and clear from there
        return up + "".join(f"{line}\n" for line in lines)
    return "".join(f"{line}\n" for line in lines if line not in before)


def write_page(folder: SweepFolder) -> str:
    """SWEEP/report.html, and the sentence that says so, or why not."""
    from .report import sweeps

    try:
        return f"figures: {sweeps.write(folder)}"
    except UserError as missing:
        return f"no page with figures: {missing}"
