"""Seconds that the planner takes: 10,000 candidates for 1,024 GPUs, and a whole plan for them, in CPU seconds of this process.

    python benchmarks/planner.py [CANDIDATES]

Target: 1 s for 10,000. The whole `plan` command is timed by benchmarks/startup.py.
"""

from __future__ import annotations

import itertools
import sys
import time

from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.config import build_config
from trebuchet.launcher.costing import Layout, request
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.planner import CHECKPOINTING, METHODS, hardware_of, make_plan
from trebuchet.strategies.memory import estimate


def main(wanted: int) -> None:
    config = build_config(
        {"model": "meta-llama/Llama-3.1-70B", "data": "t.jsonl", "optimization": {"global_batch_size": 4096}}
    )
    model, shipped = load_model_spec(config.model), load_cluster("h100-64")
    cluster = shipped.model_copy(update={"groups": (shipped.groups[0].model_copy(update={"nodes": 128}),)})
    hardware = hardware_of(config, cluster)
    layouts = [Layout("fsdp2", "none", 2**i, 1024 // 2**i) for i in range(10)] + [Layout("ddp", "none", 1024, 1)]
    cells = itertools.cycle(itertools.product(METHODS, layouts, CHECKPOINTING, (1, 2, 4, 8)))
    began = time.process_time()
    for method, layout, checkpointing, micro in itertools.islice(cells, wanted):
        estimate(request(config, model, hardware, method, layout, checkpointing, micro))
    print(f"{wanted:,} candidates for 1,024 GPUs: {time.process_time() - began:.2f} CPU-s")
    began = time.process_time()
    make_plan(config, model, cluster)
    print(f"a plan for 1,024 GPUs: {time.process_time() - began:.3f} CPU-s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
