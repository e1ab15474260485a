"""run.json: the one record of a run, read and written in one place, atomically, by launcher and rank 0 alike.

    {"run", "created", "state", "exit_code", "error", "step", "steps", "attempts": [...], "versions", "git", "host", "seed",
     "data", "model", "kernels", "evaluation", "measured_memory", "model_files", "merge", "exports", "pushed"}

Left out: secrets (nothing of the environment is recorded but versions), and the metrics, which are in metrics.jsonl.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .errors import RunError
from .job_state import JobState
from .run_folder import RunFolder, open_run

PACKAGES = (
    "trebuchet",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "triton",
    "tokenizers",
    "datasets",
    "numpy",
)


def write_atomically(path: Path, text: str) -> None:
    """Beside, synced, renamed: a reader sees the old text or the new one, never half."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:  # Ctrl+C too: nothing is left beside, and it goes on its way
        Path(name).unlink(missing_ok=True)
        raise


def read(folder: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(folder.record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.record} cannot be read: {error}") from None


def with_model(run: str) -> RunFolder:
    """A run by folder or name. Raises RunError when it has written no model."""
    folder = open_run(run)
    if not folder.model.is_dir():
        raise RunError(f"{run} is {read(folder)['state']} and has no model yet; a run writes it when it has ended.")
    return folder


def update(folder: RunFolder, **changes: Any) -> dict[str, Any]:
    """Merges `changes` into the record under a lock; `attempt={...}` goes into the last attempt."""
    with open(folder.root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = read(folder)
        attempt = changes.pop("attempt", None)
        record.update(changes)
        if attempt is not None and record["attempts"]:  # none: the ranks were started by hand
            record["attempts"][-1].update(attempt)
        write_atomically(folder.record, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def create(folder: RunFolder, **facts: Any) -> None:
    """The first record of a new run."""
    record = {
        "run": folder.root.name,
        "created": now(),
        "state": JobState.PENDING.value,
        "submitted": None,
        "exit_code": None,
        "error": None,
        "step": 0,
        "steps": None,
        "attempts": [],
        "versions": facts.pop("versions", None) or versions(),
        "git": facts.pop("git") if "git" in facts else git_state(),
        "host": {"name": platform.node(), "system": platform.platform()},
        **facts,
    }
    write_atomically(folder.record, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def begin_attempt(folder: RunFolder, handle: str, *, ranks: int) -> None:
    """`handle` names the process that will close the attempt, `ranks` is the process id of what it started."""
    with open(folder.root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = read(folder)
        attempt = {
            "handle": handle,
            "state": JobState.RUNNING.value,
            "reason": None,
            "first_step": record["step"],
            "last_step": None,
        }
        record["attempts"].append({**attempt, "ranks": ranks, "started": now(), "ended": None})
        record.update(state=JobState.RUNNING.value, exit_code=None, error=None)
        write_atomically(folder.record, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def end_attempt(
    folder: RunFolder, state: JobState, exit_code: int, error: str | None, *, goes_on: bool = False
) -> dict[str, Any]:
    """Closes the last attempt and gives the run its state; `goes_on`: it waits for another attempt. One write: whoever follows the
    run must not read an end that is none."""
    ended = {"state": state.value, "reason": error, "last_step": read(folder)["step"], "ended": now()}
    if goes_on:
        return update(folder, state=JobState.PENDING.value, exit_code=None, error=None, attempt=ended)
    return update(folder, state=state.value, exit_code=exit_code, error=error, attempt=ended)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the folder that the command runs in, and whether it holds changes; None outside a checkout."""

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(ask("status", "--porcelain"))}


def command_line() -> list[str]:
    """How the run was started. `--set` values are configuration, and configuration holds no secrets."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
