"""One rank that loads a QLoRA under FSDP2 by the product's own code and says what memory of its own that took.

    python loading.py PLAN_RUN TINY_MODEL OUT      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

Private memory (RssAnon) is sampled by a thread from before the skeleton to after the last weight; file pages are the kernel's to drop.
A tiny model is loaded first, in the same way: the code and tables that a first load brings in are no weights.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def read_bytes() -> int:
    """What the disk was asked for on behalf of this process, mapped files too (proc(5))."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def main(run: str, tiny: str, out: str) -> None:
    import torch
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor
    from trebuchet.launcher.plan import Plan
    from trebuchet.strategies.layouts import place
    from trebuchet.strategies.prepare import prepare
    from trebuchet.training.optim import make_optimizer

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    plan = Plan.model_validate_json(Path(run, "plan.json").read_text())
    assert plan.chosen is not None
    config, chosen, cpu = plan.config, plan.chosen, torch.device("cpu")

    def held(p: torch.nn.Parameter) -> int:
        return (p.to_local() if isinstance(p, DTensor) else p).numel() * p.element_size()

    def load(folder: str) -> Any:
        prepared = prepare(Path(folder), config.model, config.strategy, chosen, cpu, 0)
        return prepared, place(
            prepared, chosen, cpu, lambda m: make_optimizer(m.named_parameters(), "adamw", 1e-4, 0.0)
        )

    load(tiny)
    gc.collect()
    before, peak, over = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, private_bytes())

    thread = threading.Thread(target=watch)
    read = read_bytes()
    thread.start()
    prepared, layout = load(config.model.name)
    over.set()
    thread.join()
    base = [p for p in layout.inside.parameters() if not p.requires_grad]
    found = {
        "read_bytes": read_bytes() - read,
        "peak": max(peak, private_bytes()) - before,
        "end": private_bytes() - before,
        "base_bytes": sum(held(p) for p in base if isinstance(p, DTensor)),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in layout.inside.buffers()),
        "adapter_bytes": layout.local_bytes - sum(held(p) for p in base),
        "weights": prepared.total - prepared.trainable,
    }
    Path(out, f"{accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(*sys.argv[1:])
