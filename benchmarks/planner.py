"""Seconds that the planner takes for 10,000 candidates on 1,024 GPUs, in CPU seconds of this process, and for a whole plan on them.

    python benchmarks/planner.py [CANDIDATES]

No two candidates are equal: method x layout x checkpointing x micro-batch, for rows of growing length. Twice: each asked for its
memory, and decided as the planner does, which does not ask where a smaller one has answered. Then the same as requests of
`estimate --json`. Target: 1 s for 10,000. The whole `plan` command is timed by benchmarks/startup.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.config import build_config
from trebuchet.launcher.costing import Hardware, Layout, accumulate, request
from trebuchet.launcher.estimates import answer
from trebuchet.launcher.fitting import CHECKPOINTING, fit, micro_batches
from trebuchet.launcher.model_spec import ModelSpec, load_model_spec
from trebuchet.launcher.planner import METHODS, hardware_of, make_plan
from trebuchet.launcher.schema import TrainConfig
from trebuchet.strategies.memory import MemoryRequest, needs

RANKS = 1024
LAYOUTS = [Layout("fsdp2", "none", 2**i, RANKS // 2**i) for i in range(10)]
LAYOUTS += [Layout("ddp", "none", RANKS, 1), Layout("fsdp2", "params", 1, RANKS), Layout("zero3", "none", 1, RANKS)]


@cache
def configs() -> list[TrainConfig]:
    """The same run with rows of 256, 512, 768 and so on tokens."""
    run = {"model": "meta-llama/Llama-3.1-70B", "optimization": {"global_batch_size": 16 * RANKS}}
    return [build_config({**run, "data": {"train": "t", "max_length": 256 * i}}) for i in range(1, 129)]


def requests(model: ModelSpec, hardware: Hardware, wanted: int) -> Iterator[MemoryRequest]:
    for config in configs():
        for cell in itertools.product(METHODS, LAYOUTS, CHECKPOINTING):
            base = request(config, model, hardware, *cell, 1)
            for micro in micro_batches(config, hardware):
                if wanted == 0:
                    return
                wanted -= 1
                yield base.at(micro, accumulate(config, hardware, micro))


def decided(model: ModelSpec, hardware: Hardware, wanted: int) -> int:
    count = 0
    for config in configs():
        each = len(CHECKPOINTING) * len(micro_batches(config, hardware))
        for method, layout in itertools.product(METHODS, LAYOUTS):
            if count >= wanted:
                return count
            fit(config, model, hardware, method, layout)
            count += each
    raise AssertionError


def seconds(what: Callable[[], object], times: int = 3) -> str:
    """CPU seconds, the least of some tries: other work on the machine only adds."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        what()
        taken.append(time.process_time() - began)
    return f"{min(taken):.3f} CPU-s (of {', '.join(f'{one:.3f}' for one in sorted(taken))})"


def main(wanted: int) -> None:
    config = configs()[0]
    model, shipped = load_model_spec(config.model), load_cluster("h100-64")
    cluster = shipped.model_copy(update={"groups": (shipped.groups[0].model_copy(update={"nodes": RANKS // 8}),)})
    hardware = hardware_of(config, cluster)
    each = seconds(lambda: [needs(one) for one in requests(model, hardware, wanted)])
    print(f"{wanted:,} candidates for {RANKS:,} GPUs, each asked:      {each}")
    print(
        f"{wanted:,} candidates for {RANKS:,} GPUs, all decided:     {seconds(lambda: decided(model, hardware, wanted))}"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests.json"
        file.write_text(json.dumps([dataclasses.asdict(one) for one in requests(model, hardware, wanted)]))
        print(f"{wanted:,} requests of `estimate --json`, read and written: {seconds(lambda: answer(str(file)))}")
    print(f"a plan for {RANKS:,} GPUs: {seconds(lambda: make_plan(config, model, cluster))}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
