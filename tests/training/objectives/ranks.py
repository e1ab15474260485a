"""One rank of a test over several: three steps of each run folder, and rank 0 writes what was found.

python ranks.py OUT FOLDER …    with RANK, WORLD_SIZE and MASTER_PORT set; `measure` alone is one process without ranks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def measure(root: Path) -> list[dict[str, float]]:
    """Loss, gradient norm and the objective's figures of three steps, then those of the held-out rows."""
    from accelerate import Accelerator
    from trebuchet.launcher.plan import Plan
    from trebuchet.launcher.run_folder import RunFolder
    from trebuchet.training.data import share
    from trebuchet.training.evaluate import held_out_loss
    from trebuchet.training.runtime import Runtime
    from trebuchet.training.scores import of_stepper
    from trebuchet.training.session import Session

    folder = RunFolder(Path(root))
    plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
    session = Session(Runtime(plan, folder, Accelerator(cpu=True)))
    loop = session.loop(session.prepared())
    runtime, found = session.runtime, []
    for number in range(3):
        parts = share(loop.order.batch(number), runtime.rank, runtime.world, loop.micro_batch)
        result = loop.stepper.step([loop.batch(part) for part in parts])
        found.append({"loss": result.loss, "grad_norm": result.grad_norm, **result.figures})
    assert loop.held_out is not None
    held = held_out_loss(of_stepper(loop.stepper), loop.stepper.objective, loop.held_out, loop.pad_id)
    rows = held.pop("rows")
    return [*found, held | {f"{name} {i}": value for name, column in rows.items() for i, value in enumerate(column)}]


def main(out: str, *roots: str) -> None:
    import torch.distributed as dist

    found: list[Any] = [measure(Path(root)) for root in roots]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
