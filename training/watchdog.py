"""A run in which no step ends any more: each rank says where it is, the one that the others wait for is named, all end.

Without it ranks wait for each other until the process group's own time-out, half an hour or never, and then every one of them
reports the same. A thread of each rank looks at the time of its last step; it needs no collective, because those are what hangs.
One watches loading and the probe step, another the steps. Left out: the first evaluation, the export, and what the scheduler does next
(slurm/classify.py).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..launcher.plan import Plan
from ..launcher.record import write_atomically
from ..launcher.run_folder import RunFolder

# Where the plan predicts no speed: longer than any step, evaluation or save should take.
LIMIT_S = 1800.0
# Else so many steps as the plan predicts them, and no less than SHORTEST_S: an evaluation or a save takes as long as many steps.
STEPS, SHORTEST_S = 20.0, 900.0
# Loading reads every weight once. A file server that gives a rank less than this is as good as stuck.
READ_BYTES_S = 20e6
GATHER_S = 5.0  # what ranks wait for each other's words, which they write within a poll of each other
# Where a rank's stack ends when it waits for others, or for the GPU that waits for them.
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "torch/cuda/", "training/runtime.py")


class Watchdog:
    """Watches from `start` to `stop`; `beat` after everything that may take long. `doing`: what is watched when it is not steps."""

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        world: int,
        limit_s: float,
        *,
        doing: str = "",
        end: Callable[[int], Any] = os._exit,
    ):
        self.folder, self.rank, self.world, self.limit_s, self.end = folder, rank, world, limit_s, end
        self.doing = doing
        self.step, self.at = 0, time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.watched = threading.main_thread().ident

    def start(self, step: int) -> None:
        words_of(self.folder, self.rank).unlink(missing_ok=True)
        self.beat(step)
        if self.limit_s > 0:
            self.thread.start()

    def beat(self, step: int) -> None:
        self.step, self.at = step, time.monotonic()

    def stop(self) -> None:
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.limit_s / 4)):
            if time.monotonic() - self.at > self.limit_s:
                self._report()
                return

    def _report(self) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self.watched])  # type: ignore[index]
        print(
            f"{self.what()}; this rank is at:",
            *traceback.format_list(stack),
            sep="\n",
            file=sys.stderr,
        )
        ours = next((f for f in reversed(stack) if "trebuchet" in f.filename or "training/" in f.filename), stack[-1])
        words = {
            "rank": self.rank,
            "node": os.environ.get("SLURMD_NODENAME") or platform.node(),
            "step": self.step,
            "waiting": any(part in stack[-1].filename for part in WAITING),
            "where": f"{Path(ours.filename).name}:{ours.lineno} in {ours.name}",
        }
        write_atomically(words_of(self.folder, self.rank), json.dumps(words))
        self._flight_record()
        self.stopped.wait(GATHER_S)
        found = [json.loads(path.read_text()) for path in sorted(self.folder.logs.glob("hang-*.json"))]
        blamed = blame(found, self.world)
        if not self.folder.outcome.exists():
            error = f"hang: {self.what()}{'' if self.doing else f' after step {self.step}'}. {blamed['sentence']}"
            outcome = {"exit_code": 1, "error": error, "rank": blamed["rank"], "node": blamed["node"]}
            write_atomically(self.folder.outcome, json.dumps(outcome))
        self.end(1)

    def what(self) -> str:
        return (
            f"{self.doing} did not end within {self.limit_s:g} s" if self.doing else f"no step for {self.limit_s:g} s"
        )

    def _flight_record(self) -> None:
        """Every collective of this rank that torch still remembers, with its Python frames: logs/flight-R.json."""
        import torch

        if torch.distributed.is_initialized():
            found: bytes = torch._C._distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
            (self.folder.logs / f"flight-{self.rank}.json").write_bytes(found)


def hang_limit_s(plan: Plan) -> float:
    """Seconds without a step after which a run hangs: from the speed that the plan predicts, or TREBUCHET_HANG_S; 0 switches the
    watch off."""
    if wanted := os.environ.get("TREBUCHET_HANG_S"):
        return float(wanted)
    assert plan.chosen is not None
    speed = plan.chosen.time.tokens_per_s
    tokens = plan.config.optimization.global_batch_size * plan.config.data.max_length
    return max(SHORTEST_S, STEPS * tokens / speed) if speed else LIMIT_S


def loading_limit_s(plan: Plan) -> float:
    """Seconds for everything before the first step but the evaluation: by the size of the model, or TREBUCHET_LOADING_S; 0 as above."""
    if wanted := os.environ.get("TREBUCHET_LOADING_S"):
        return float(wanted)
    weights = plan.model.weights_bytes or 2 * plan.model.params
    return LIMIT_S + weights / READ_BYTES_S


def collective_limit_s(plan: Plan) -> float:
    """The process group's own time-out, should the watchdog's thread be stuck too: later than the watchdog, so that it speaks first."""
    return max(LIMIT_S, 2 * hang_limit_s(plan), 60 + loading_limit_s(plan))


def blame(found: Sequence[dict[str, Any]], world: int) -> dict[str, Any]:
    """The rank that the others wait for: one without a word, else one that is not waiting, else the one furthest behind."""
    silent = sorted(set(range(world)) - {words["rank"] for words in found})
    if silent:
        names = ", ".join(map(str, silent))
        return {
            "rank": silent[0],
            "node": None,
            "sentence": f"Without a word: rank {names}; stopped, or stuck outside of Python.",
        }
    busy = [words for words in found if not words["waiting"]]
    behind = [words for words in found if words["step"] < max(other["step"] for other in found)]
    for one in [*busy, *behind][:1]:
        what = "is not waiting for others, but" if one in busy else "is behind: it"
        sentence = f"Rank {one['rank']} on {one['node']} {what} is at {one['where']}, step {one['step']}."
        return {"rank": one["rank"], "node": one["node"], "sentence": sentence}
    return {
        "rank": 0,
        "node": None,
        "sentence": "All ranks wait for each other; look at the network between the nodes.",
    }


def words_of(folder: RunFolder, rank: int) -> Path:
    return folder.logs / f"hang-{rank}.json"
