"""`accelerate launch`, whose last word is the run's and not torchrun's.

    python -m trebuchet.launcher.first_failure RUN ARGUMENT ...        arguments of `accelerate launch`

When a rank ends, torchrun prints some forty lines around what the rank itself has said. Here they become a file with what only torchrun
knows: which rank ended first, and how. The words that close a run take it from there. Left out: what a rank says of itself (worker.py),
and ranks that srun or Ray started.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path

from .record import write_atomically
from .run_folder import RunFolder

ECHO = "another rank ended"  # worker.describe; what a rank says that only saw the others go


def main(run: str, *arguments: str) -> int:
    import torch.distributed.run  # noqa: F401  makes the loggers that are told to be quiet
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.argv = ["accelerate launch", *arguments]
    try:
        launch.main()
    except SignalException as told:
        return 128 + int(told.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        file = RunFolder(Path(run)).first_failure
        write_atomically(file, json.dumps({"rank": rank, "exit_code": failure.exitcode}))
        return 1
    return 0


def named(folder: RunFolder, error: str | None) -> str | None:
    """The error of a rank that only saw another go becomes what is known of that one, where a signal ended it; any other stays."""
    killed = _killed(folder)
    if killed is None or error is None or ECHO not in error:
        return error
    rank, how = killed
    words = f"rank {rank} was ended by {how}{_meaning(how)}; the others, who waited for it, ended."
    return f"{words} {_tail(folder.log(rank))}" if folder.log(rank).exists() else words


def without_a_word(folder: RunFolder, exit_code: int) -> str:
    """Of ranks that ended and left no outcome: never started, or killed from outside, most often by the kernel for memory."""
    if not folder.log(0).exists():
        return f"accelerate could not start the ranks (exit {exit_code}); what it said is above."
    killed = _killed(folder)
    if killed is None or not folder.log(killed[0]).exists():
        why = "When the kernel ends a process for want of memory it looks like this."
        return f"the ranks ended without a word (exit {exit_code}). {why} {_tail(folder.log(0))}"
    rank, how = killed
    return f"the ranks ended without a word; rank {rank} was ended by {how}{_meaning(how)}. {_tail(folder.log(rank))}"


def _meaning(how: str) -> str:
    return ", as the kernel does for want of memory" if how == "SIGKILL" else ""


def _killed(folder: RunFolder) -> tuple[int, str] | None:
    """The rank that ended first and the name of the signal, if it was one."""
    if not folder.first_failure.exists():
        return None
    found = json.loads(folder.first_failure.read_text(encoding="utf-8"))
    if found["exit_code"] >= 0:
        return None
    number = -found["exit_code"]
    known = {each.value: each.name for each in signal.Signals}
    return found["rank"], known.get(number, f"signal {number}")


def _tail(log: Path, lines: int = 3) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]
    return f"Last lines of {log}: " + " / ".join(text)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
