"""The one loop that every strategy runs: steps, evaluations, checkpoints, a stop that loses nothing.

What a step computes is in step.py, what it reads in data/, what is saved in checkpoint.py. Left out: how the model was prepared.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..launcher import record
from ..launcher.errors import RunError
from ..launcher.schema import Checkpointing, Evaluation
from . import checkpoint
from .data import Order, Units, share
from .evaluate import HeldOut, in_words
from .judge import Best, Judge
from .phases import OTHER
from .probe import heaviest, probe
from .progress import Progress
from .runtime import Runtime
from .scores import of_stepper
from .step import Stepper
from .watchdog import Watchdog, hang_limit_s

# Rows are as wide as a multiple of this: few distinct sizes keep an allocator from filling up with holes of almost the right size
# (resident memory of the demo grew from 3.0 to 5.6 GiB in 24 steps without it), and matrix products like round ones.
WIDTH = 64
NAMED = {"kl": "kl_nats", "general": "general_loss"}  # in metrics.jsonl; the others are of the held-out rows: eval_…


@dataclass
class Loop:
    runtime: Runtime
    stepper: Stepper
    units: Units
    rows: Sequence[Sequence[int]]  # units of each packed row
    packing: bool
    order: Order
    held_out: HeldOut | None
    judge: Judge | None  # where there are held-out rows
    micro_batch: int
    pad_id: int
    evaluation: Evaluation
    checkpointing: Checkpointing
    identity: dict[str, Any]  # what a checkpoint must match to be resumed from: data fingerprint, batch, seed
    before: dict[str, Any] | None = field(default=None, init=False)  # the base's figures, for comparing while it trains
    step_s: float = field(default=0.0, init=False)  # the longest step of this attempt
    measured: tuple[int, float] = field(default=(0, 0.0), init=False)  # step and loss of the last evaluation

    def __post_init__(self) -> None:
        self.saver = checkpoint.Saver(self.runtime.folder, self.runtime.rank, self.runtime.barrier)
        self.best = Best(self.evaluation)

    def resume(self) -> int:
        """Fills everything from the newest valid checkpoint; returns the number of steps that are done."""
        self.runtime.barrier()
        random_state = checkpoint.rng_state()
        probe(self.stepper, self.batch(heaviest(self.rows, self.units.lengths.tolist(), self.micro_batch)))
        checkpoint.set_rng_state(random_state)
        # Rank 0 alone looks: hashing on every rank costs as many reads, and ranks that disagree would hang.
        found = checkpoint.latest(self.runtime.folder, say=self.say) if self.runtime.main else None
        step = int(self.runtime.total(checkpoint.step_of(found) if found else 0)[0])
        if step == 0:
            return 0
        path = self.runtime.folder.checkpoint(step)
        state = checkpoint.load(path, self.stepper.layout.load, rank=self.runtime.rank)
        if state["identity"] != self.identity:
            changed = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
            raise RunError(
                f"{path} was made with another {', '.join(changed)}; the run cannot go on from it exactly. Start a new run."
            )
        self.stepper.schedule.load_state_dict(state["schedule"])
        # The scheduler's state holds no rates; the optimizer's groups do.
        for group, rate in zip(self.stepper.optimizer.param_groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        if self.stepper.scaler:
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.best = Best(self.evaluation, self.remembered(state.get("best") or {}))
        return int(state["step"])

    def remembered(self, best: dict[str, Any]) -> dict[str, Any] | None:
        """The best evaluation before this attempt, if it is of the figure that counts now (`resume --set evaluation.best=…` may name
        another) and its weights can still be had."""
        if best.get("name") != self.best.name:
            return None
        if self.evaluation.best == "last" or best.get("step") is None:
            return best
        path = self.runtime.folder.checkpoint(best["step"])
        problem = checkpoint.check(path) if self.runtime.main else None
        if not self.runtime.total(float(problem is not None))[0]:
            return best
        self.say(
            f"the best {self.best.name} so far was that of {path.name}, which is not there whole; a later one counts"
        )
        return None

    def run(self, first: int, until: int | None = None) -> bool:
        """Steps `first` to the end. True when the end was reached, False when a stop was asked for and a checkpoint saved, or when
        step `until` was reached: then nothing is evaluated or saved."""
        steps = self.order.steps
        evaluate_at, save_at = due(self.evaluation.every, steps), due(self.checkpointing.every, steps)
        if self.runtime.main:
            record.update(self.runtime.folder, step=first, steps=steps, attempt={"first_step": first})
        progress = Progress(self.runtime, steps, first)
        saved = first
        watchdog = Watchdog(self.runtime.folder, self.runtime.rank, self.runtime.world, hang_limit_s(self.runtime.plan))
        watchdog.start(first)
        try:
            if self.runtime.stopping():  # asked while the model was loaded: there is nothing to save yet
                progress.say(f"stopped before step {first + 1}/{steps}")
                return False
            for step in range(first, steps):
                self.train_step(step, progress)
                done = step + 1
                watchdog.beat(done)
                if self.runtime.main:
                    record.update(self.runtime.folder, step=done, steps=steps)
                if until is not None:
                    if done == until:
                        return False
                    continue
                improved = False
                if done in evaluate_at and self.judge is not None:
                    improved = self.evaluate(done, progress)
                    watchdog.beat(done)
                stopping = self.runtime.stopping(self.lead_s())
                keep = improved and self.evaluation.best != "last"
                if done in save_at or stopping or keep or self.best.enough or done == steps:
                    self.save(done, background=self.checkpointing.background and not stopping)
                    saved = done
                    watchdog.beat(done)
                if self.best.enough:
                    self.stop_early(done, progress)
                    break
                if stopping and done < steps:
                    if self.runtime.main:
                        record.update(self.runtime.folder, attempt={"lead_s": round(self.lead_s(), 1)})
                    progress.say(f"stopped after step {saved}/{steps}; the checkpoint is saved")
                    return False
            self.saver.wait()
            return True
        finally:
            watchdog.stop()
            progress.close()

    def train_step(self, step: int, progress: Progress) -> None:
        began = time.perf_counter()
        micro = share(self.order.batch(step), self.runtime.rank, self.runtime.world, self.micro_batch)
        result = self.stepper.step([self.batch(rows) for rows in micro])
        seconds = time.perf_counter() - began
        self.step_s = max(self.step_s, seconds)
        values = {**asdict(result), "epoch": round(self.order.epoch(step + 1), 4)}
        values["lr"] = values.pop("learning_rate")
        values |= values.pop("figures")
        progress.step(step + 1, values, seconds)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        units = [self.rows[row] for row in rows]
        return self.stepper.objective.collate(self.units, units, packing=self.packing, pad_id=self.pad_id, width=WIDTH)

    def evaluate(self, done: int, progress: Progress) -> bool:
        """Whether the figure that counts is the best so far."""
        assert self.judge is not None
        found = self.judge.on_the_way(of_stepper(self.stepper), self.before)
        self.measured = (done, found["loss"])
        named = {
            NAMED.get(key, f"eval_{key.rpartition(':')[2]}"): value for key, value in found.items() if key != "tokens"
        }
        progress.write({"step": done, **named})
        chosen_by = self.best.name
        if chosen_by not in found:
            raise RunError(
                f"the base's figures in {self.runtime.folder.evaluation} are gone, so {chosen_by} cannot be told."
            )
        more = (
            f", {chosen_by.rpartition(':')[2]} {found[chosen_by]:.4g}"
            if chosen_by not in ("loss", "accuracy", "margin")
            else ""
        )
        progress.say(f"step {done}/{self.order.steps}  held-out {in_words(found)}{more}")
        return self.best.see(done, found[chosen_by])

    def stop_early(self, done: int, progress: Progress) -> None:
        best = self.best
        words = f"{best.since} evaluations without a better {best.name} than {best.value:.4g} of step {best.step}"
        if self.runtime.main:
            record.update(self.runtime.folder, stopped_early=f"after step {done} of {self.order.steps}: {words}")
        progress.say(f"step {done}/{self.order.steps}  training ends here: {words}")

    def take_best(self) -> None:
        """The weights of the best evaluation, where that was asked for; collective."""
        if self.evaluation.best == "last" or self.best.step is None:
            return
        path = self.runtime.folder.checkpoint(self.best.step)
        checkpoint.load(path, self.stepper.layout.load, rank=self.runtime.rank)
        if self.runtime.main:
            record.update(self.runtime.folder, best=self.best.state())
        self.say(f"the model is that of step {self.best.step}, with the best {self.best.name} ({self.best.value:.4g})")

    def save(self, done: int, *, background: bool = False) -> None:
        state = {"schedule": self.stepper.schedule.state_dict(), "identity": self.identity, "world": self.runtime.world}
        state["best"] = self.best.state()
        if self.stepper.scaler:
            state["scaler"] = self.stepper.scaler.state_dict()
        if self.measured[0] == done:
            state["held_out_loss"] = self.measured[1]
        kept = self.checkpointing
        write = self.stepper.layout.save
        also = self.best.step if self.evaluation.best != "last" else None
        memory = self.runtime.memory
        memory.enter("checkpoint_save")
        self.saver.save(done, write, state, keep=kept.keep, keep_best=kept.keep_best, also=also, background=background)
        memory.enter(OTHER)
        measured = memory.facts(self.runtime.most(*memory.values()))  # of the rank with most
        if self.runtime.main:
            # The seconds size the warning of the next job.
            more = {"save_s": round(self.saver.seconds, 3)} if self.saver.seconds else {}
            record.update(self.runtime.folder, measured_memory=measured, **more)

    def lead_s(self) -> float:
        """Seconds before the end of the job's time at which to save: a step and a save, with room for slower ones."""
        return 2 * self.step_s + 3 * self.saver.seconds

    def say(self, text: str) -> None:
        if self.runtime.main:
            print(text, file=sys.stderr, flush=True)


def due(every: float, steps: int) -> set[int]:
    """The steps after which something is due: each `every` steps, or each share `every` of the run when below 1."""
    if every >= 1 or steps * every <= 1:
        return set(range(max(1, int(every)), steps + 1, max(1, int(every))))
    # Rounded first: 24 x 0.1 x 10 is 24.000000000000004, and the end of the run must be among them.
    return {math.ceil(round(steps * every * i, 6)) for i in range(1, math.floor(1 / every + 1e-9) + 1)}
