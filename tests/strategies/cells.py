"""What one rank of the matrix runs: each cell trains the same six steps through the product's own session, and says what it saw.

    python cells.py JOB.json          with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment

JOB.json: {"config": …, "out": FOLDER, "cells": {NAME: {"strategy": {…}, "chosen": {…}, "top": {…}}}}. `strategy` are keys of the YAML,
`chosen` replaces fields of the plan that a planner for a CPU would not choose (offload). Rank 0 writes out/WORLD.json.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

STEPS = 6


def run_cell(name: str, cell: dict[str, Any], job: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    import torch
    from trebuchet.kernels import functional
    from trebuchet.launcher import api
    from trebuchet.launcher.run_folder import RunFolder
    from trebuchet.strategies.prepare import prepare
    from trebuchet.training.export import export
    from trebuchet.training.runtime import Runtime
    from trebuchet.training.session import Session

    tree = copy.deepcopy(job["config"])
    world = int(os.environ["WORLD_SIZE"])
    folder = RunFolder(Path(job["out"]) / f"{name}-{world}".replace(" ", "_"))
    for section, values in cell.get("top", {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    tree |= {"strategy": {**tree["strategy"], **cell["strategy"]}, "output": str(folder.root)}
    tree["cluster"] = {"name": "local", "processes": world}
    plan = api.plan(tree)
    assert plan.chosen is not None, [r.reason for r in plan.rejected]
    plan = plan.model_copy(update={"chosen": plan.chosen.model_copy(update=cell.get("chosen", {}))})
    if accelerator.process_index == 0:
        api.write(folder, plan, None)
        folder.logs.mkdir()
    accelerator.wait_for_everyone()
    session = Session(Runtime(plan, folder, accelerator))
    config, chosen = session.config, session.chosen
    seed = config.optimization.seed
    prepared = prepare(session.base, config.model, config.strategy, chosen, session.runtime.device, seed)
    loop = session.loop(prepared)
    found: dict[str, Any] = {"parallel": chosen.parallel, "method": chosen.method, "losses": [], "norms": []}
    found |= observe(loop.stepper.layout)
    functional.reset_calls()
    for step in range(STEPS):
        result = loop.stepper.step([loop.batch(rows) for rows in micro_batches(loop, step)])
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        if step == 2:  # training goes on as if there had been none
            session.measure(loop)
            found["after_evaluation"] = observe(loop.stepper.layout)
    found["calls"] = sorted(functional.calls())
    found["kernels"] = prepared.kernels.summary() if prepared.kernels else None
    found["gathered"] = {n: list(t.shape) for n, t in loop.stepper.layout.whole(lambda n: True)}
    with torch.no_grad(), loop.stepper.autocasting():
        loop.stepper.model.eval()
        ids = torch.arange(3, 35)[None]
        logits = loop.stepper.model(input_ids=ids, use_cache=False).logits.float()
        loop.stepper.layout.rest()
    path = export(folder, plan, session.base, loop.stepper.layout, session.tokenizer, main=session.runtime.main)
    if session.runtime.main:
        torch.save(logits, path / "logits.pt")
    found["model"] = str(path)
    return found


def micro_batches(loop: Any, step: int) -> list[tuple[int, ...]]:
    from trebuchet.training.data import share

    return share(loop.order.batch(step), loop.runtime.rank, loop.runtime.world, loop.micro_batch)


def observe(layout: Any) -> dict[str, Any]:
    """What of the model is on this rank, read off the parameters and not off what the layout says of itself."""
    from torch.distributed.tensor import DTensor

    layout.rest()
    kinds, local, whole, four_bit = set(), 0, 0, 0
    for parameter in layout.inside.parameters():
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        kinds.add(type(parameter).__name__)
        local += mine.numel() * mine.element_size()
        whole += parameter.numel() * parameter.element_size()
        four_bit += mine.numel() if mine.dtype.is_floating_point is False else 0
    return {"kinds": sorted(kinds), "local_bytes": local, "whole_bytes": whole, "packed_bytes": four_bit}


def main(path: str) -> None:
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    found = {}
    for name, cell in job["cells"].items():
        try:
            found[name] = run_cell(name, cell, job, accelerator)
        except Exception:
            print(f"cell {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # the other ranks wait in a collective
    out = Path(job["out"]) / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json"
    out.write_text(json.dumps(found), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
