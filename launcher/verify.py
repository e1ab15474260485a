"""`trebuchet resume --verify RUN`: are the recorded losses what the checkpoints lead to?

Steps after a checkpoint are made again, in a folder of their own below the run, by the same ranks and plan, and their losses are
compared with those in metrics.jsonl. Nothing of the run changes. Left out: runs of other schedulers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

from . import local, record
from .errors import JobFailed, RunError, SchedulerRefused
from .plan import Plan
from .run_folder import RunFolder

# A step of another number of ranks, or on a GPU, sums in another order.
CLOSE = 1e-5


@dataclass(frozen=True)
class Verdict:
    """`largest`: the largest relative difference of a loss; 0.0 is equality to the bit."""

    checkpoint: int
    steps: int
    largest: float

    @property
    def holds(self) -> bool:
        return self.largest <= CLOSE

    def text(self) -> str:
        how = "to the bit" if self.largest == 0 else f"to {self.largest:.1e} relative"
        what = "give the recorded losses" if self.holds else "do NOT give the recorded losses: they differ"
        return f"{self.steps} steps from the checkpoint of step {self.checkpoint} {what} {how}"


def verify(folder: RunFolder, steps: int) -> Verdict:
    """Replays up to `steps` steps from the newest valid checkpoint that recorded steps follow. Raises RunError when there is none,
    JobFailed when the replay itself fails."""
    from ..training import checkpoint

    plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
    if plan.cluster.scheduler != "local":
        raise SchedulerRefused(f"{folder.root} ran on {plan.cluster.name}; --verify replays runs of this machine only.")
    recorded = losses(folder)
    usable = [p for p in checkpoint.all_of(folder) if checkpoint.step_of(p) + 1 in recorded and not checkpoint.check(p)]
    if not usable:
        raise RunError(
            f"{folder.root} has no valid checkpoint with recorded steps after it; there is nothing to replay."
        )
    start = usable[-1]
    first = checkpoint.step_of(start)
    until = min(first + steps, max(recorded))
    scratch = RunFolder(folder.root / "verify")
    shutil.rmtree(scratch.root, ignore_errors=True)
    scratch.checkpoints.mkdir(parents=True)
    scratch.checkpoint(first).symlink_to(start)
    quiet = plan.model_copy(update={"config": plan.config.model_copy(update={"tracking": ()})})
    scratch.plan.write_text(quiet.model_dump_json(indent=1) + "\n", encoding="utf-8")
    record.create(scratch, run=f"{folder.root.name} (verify)")
    local.attempt(scratch, quiet, until=until)
    again = losses(scratch)
    if set(again) != set(range(first + 1, until + 1)):
        raise JobFailed(f"the replay failed: {record.read(scratch)['error']} Its folder is {scratch.root}.")
    largest = max(abs(again[s] - recorded[s]) / abs(recorded[s]) for s in again)
    verdict = Verdict(checkpoint=first, steps=len(again), largest=largest)
    if verdict.holds:
        shutil.rmtree(scratch.root)
    return verdict


def losses(folder: RunFolder) -> dict[int, float]:
    """Step -> loss, of metrics.jsonl."""
    if not folder.metrics.exists():
        return {}
    lines = [line for line in folder.metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {v["step"]: v["loss"] for v in map(json.loads, lines) if "loss" in v}
