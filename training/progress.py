"""What a person sees while a run trains, and what machines read afterwards: a bar, metrics.jsonl, trackers. Rank 0 only.

On a terminal a bar (tqdm); elsewhere one line now and then, so that a log file stays readable. Both show loss, tokens/s, the time
left and the peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from ..launcher import record
from .runtime import Runtime

GIB = 2**30
WINDOW = 20  # steps over which tokens/s is averaged: long enough to be steady, short enough to follow a change
QUIET_S = 10.0  # seconds between two lines where there is no terminal


class Progress:
    def __init__(self, runtime: Runtime, steps: int, first: int, stream: TextIO | None = None):
        self.runtime, self.steps = runtime, steps
        self.stream = stream or sys.stderr
        self.recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.began = self.said = time.monotonic()
        self.bar: Any = None
        self.metrics: TextIO | None = None
        if runtime.main:
            self.metrics = keep_until(runtime.folder.metrics, first).open("a", encoding="utf-8")
            if self.stream.isatty():
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=first, unit="step", file=self.stream, dynamic_ncols=True)

    def step(self, step: int, values: dict[str, float], seconds: float) -> None:
        """After optimizer step `step` (counted from 1) that took `seconds`."""
        self.recent.append((int(values["tokens"]), seconds))
        speed = self.tokens_per_s()
        peak = self.runtime.memory.largest_bytes()
        self.write(
            {
                "step": step,
                **values,
                "tokens_per_s": round(speed, 1),
                "step_s": round(seconds, 4),
                "peak_memory_bytes": peak,
            }
        )
        if not self.runtime.main:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s, peak {peak / GIB:.1f} GiB", refresh=False
            )
            self.bar.update(1)
        elif time.monotonic() - self.said > QUIET_S or step in (1, self.steps):
            self.said = time.monotonic()
            left = (self.steps - step) * sum(s for _, s in self.recent) / len(self.recent)
            self.say(
                f"step {step}/{self.steps}  loss {values['loss']:.3f}  {speed:,.0f} tokens/s  {clock(left)} left  "
                f"peak memory {peak / GIB:.1f} GiB"
            )

    def tokens_per_s(self) -> float:
        """Non-padding tokens per second over all ranks, averaged over the last steps."""
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True)) if self.recent else (0, 0.0)
        return tokens / seconds if seconds else 0.0

    def write(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        if self.metrics is None:
            return
        self.metrics.write(json.dumps(values) + "\n")
        self.metrics.flush()
        numbers = {k: v for k, v in values.items() if k != "step"}
        self.runtime.accelerator.log(numbers, step=values["step"])

    def say(self, text: str) -> None:
        if not self.runtime.main:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.metrics is not None:
            self.metrics.close()


def keep_until(path: Path, step: int) -> Path:
    """Drops lines of steps after `step`, which a resumed run will write again, and the half line that a killed run may leave."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        record.write_atomically(path, "".join(line + "\n" for line in kept))
    return path


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
