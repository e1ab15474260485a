"""Every file name of a run folder, and the one way to take a folder for a new run.

Left out: what stands in the files. No other module spells a path inside a run folder.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .errors import RunError

GIB = 2**30
SCHEDULER_LOG = "logs/slurm.log"  # relative: a job script works inside of its run folder


@dataclass(frozen=True)
class RunFolder:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "train.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def accelerate(self) -> Path:
        return self.root / "accelerate.yaml"

    @property
    def script(self) -> Path:
        """What was submitted to a scheduler, byte for byte."""
        return self.root / "job.sh"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def merged(self) -> Path:
        """The adapter merged into its base; written by `trebuchet merge` only."""
        return self.root / "merged"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def trackers(self) -> Path:
        return self.root / "trackers"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def scheduler_log(self) -> Path:
        """What the job script, srun and Slurm itself say."""
        return self.root / SCHEDULER_LOG

    @property
    def reserve(self) -> Path:
        """A little space, given up when an attempt fails, so that a full disk does not swallow the reason."""
        return self.root / ".reserve"

    @property
    def outcome(self) -> Path:
        """What the ranks say of how they ended: the first cause, for whoever closes the record."""
        return self.logs / "outcome.json"

    @property
    def first_failure(self) -> Path:
        """Which rank ended first, and how, by whoever started the ranks of this machine."""
        return self.logs / "first_failure.json"

    @property
    def stop(self) -> Path:
        """Its presence asks every rank to save at the next step boundary and leave."""
        return self.root / "stop"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"


def new_run(output: str) -> RunFolder:
    """The folder of a run that has not begun: absent or empty, its parent writable. Creates nothing yet."""
    root = Path(output).expanduser().absolute()
    folder = RunFolder(root)
    if folder.record.exists():
        raise RunError(
            f"{output} holds another run. Name another folder with `--set output=FOLDER`, go on with that run by "
            f"`trebuchet resume {output}`, or remove the folder."
        )
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RunError(
            f"{output} exists and is not an empty folder; a run needs a folder of its own: --set output=FOLDER."
        )
    parent = existing_parent(root)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(
            f"cannot write in {parent}, where the run folder {output} would be; choose another: --set output=FOLDER."
        )
    return folder


def open_run(path: str) -> RunFolder:
    """An existing run, by its folder, or by its name below runs/."""
    for root in (Path(path).expanduser(), Path("runs") / path):
        if (root / "run.json").exists():
            return RunFolder(root.absolute())
        if (root / "sweep.json").exists():
            raise RunError(f"{path} is a sweep; name one of its trials, such as {root / 'trials' / '000'}.")
    raise RunError(f"{path} is not a run: there is no run.json in it. `trebuchet list` shows the runs below runs/.")


def existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def require_disk(folder: RunFolder, needed_bytes: int, what: str) -> None:
    """RunError when the file system of the run folder has less free space than `needed_bytes`."""
    free = shutil.disk_usage(existing_parent(folder.root)).free
    if free < needed_bytes:
        raise RunError(
            f"{folder.root} is on a file system with {free / GIB:.1f} GiB free; {what} needs {needed_bytes / GIB:.1f} GiB. "
            "Free some space, put the run elsewhere with --set output=FOLDER, or keep fewer checkpoints with "
            "--set checkpointing.keep=1."
        )
