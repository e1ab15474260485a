"""What the ranks of the matrix run: the product's own session, loop and export, on gloo, in processes forked from one that has imported.

    python cells.py JOB.json

JOB.json: {"config": …, "out": FOLDER, "groups": [{"world": 2, "cells": {NAME: CELL}}]}, groups one after the other. A cell is
{"strategy": keys of the YAML, "top": {section: keys}, "chosen": fields of the plan that a planner for a CPU would not choose (offload),
"model": FOLDER, "from": NAME, "steps": [first, last], "save": [step, …], "figures": {step: held-out loss to be believed after it},
"shard_bytes": of an exported file, "evaluate", "export", "leave_out", "refused", "loaded", "take_best": true}. Each rank writes what it
saw, by cell, into out/NAME-RANK.json.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STEPS = 6


def run_cell(name: str, cell: dict[str, Any], job: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    """Trains from the newest checkpoint of its folder, if it has one, and looks at everything that the tests ask about."""
    from trebuchet.kernels import functional

    if cell.get("leave_out"):
        return {"error": without_the_root(name, cell, job, accelerator)}
    loop, prepared = start(name, cell, job, accelerator)
    layout = loop.stepper.layout
    chosen = loop.session.chosen.model_dump(mode="json")
    found: dict[str, Any] = {"chosen": chosen, "losses": [], "norms": [], "tokens": [], **observe(layout)}
    functional.reset_calls()
    if cell.get("loaded"):
        found["loaded"] = digests(layout, lambda name: ".lora_" not in name, packed=False)
    if cell.get("refused"):
        return {"error": refusal(loop)}
    done = loop.resume()
    first, last = cell.get("steps", [0, STEPS])
    assert done == first, (done, first)
    for step in range(first, last):
        result = loop.stepper.step([loop.batch(rows) for rows in micro_batches(loop, step)])
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["tokens"].append((result.tokens, result.trained_tokens))
        if step == 2 and cell.get("evaluate"):  # training goes on as if there had been none
            loop.session.measure(loop)
            found["after_evaluation"] = observe(layout)
        if str(step + 1) in cell.get("figures", {}):
            loop.best.see(step + 1, cell["figures"][str(step + 1)])
            found["trained"] = digests(layout, trained(loop), packed=False)
        if step + 1 in cell.get("save", []):
            loop.save(step + 1, background=cell.get("background", False))
    loop.saver.wait()
    accelerator.wait_for_everyone()
    if cell.get("take_best"):
        loop.take_best()
        found["checkpoints"] = sorted(p.name for p in loop.saver.folder.checkpoints.glob("step-*"))
        found["best"] = {"step": loop.best.step, "trained": digests(layout, trained(loop), packed=False)}
    found["calls"] = sorted(functional.calls())
    found["kernels"] = prepared.kernels.summary() if prepared.kernels else None
    found["frozen_bytes"] = digests(layout) if cell.get("digests", True) else None
    if cell.get("export"):
        found["model"] = leave(loop, **({"shard_bytes": cell["shard_bytes"]} if "shard_bytes" in cell else {}))
    return found


def start(name: str, cell: dict[str, Any], job: dict[str, Any], accelerator: Any) -> tuple[Any, Any]:
    """A session with its model prepared, in the folder of the cell: a new one, or the one of the cell that it goes on `from`."""
    from trebuchet.launcher import api
    from trebuchet.launcher.run_folder import RunFolder
    from trebuchet.training.runtime import Runtime
    from trebuchet.training.session import Session

    tree = copy.deepcopy(job["config"])
    folder = RunFolder(Path(job["out"]) / cell.get("from", name).replace(" ", "_"))
    for section, values in cell.get("top", {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    tree |= {"strategy": {**tree["strategy"], **cell["strategy"]}, "output": str(folder.root)}
    tree["model"] = {**tree["model"], **({"name": cell["model"]} if "model" in cell else {})}
    tree["cluster"] = {"name": "local", "processes": accelerator.num_processes}
    plan = api.plan(tree)
    assert plan.chosen is not None, [r.reason for r in plan.rejected]
    plan = plan.model_copy(update={"chosen": plan.chosen.model_copy(update=cell.get("chosen", {}))})
    if accelerator.process_index == 0 and not folder.root.exists():
        api.write(folder, plan, None)
        folder.logs.mkdir()
    accelerator.wait_for_everyone()
    session = Session(Runtime(plan, folder, accelerator))
    prepared = session.prepared()
    loop = session.loop(prepared)
    loop.session = session  # type: ignore[attr-defined]
    return loop, prepared


def refusal(loop: Any) -> str:
    """What a checkpoint of another kind is answered with."""
    from trebuchet.strategies.layouts import LayoutError

    try:
        loop.resume()
    except LayoutError as problem:
        return str(problem)
    return "nothing was said"


def without_the_root(name: str, cell: dict[str, Any], job: dict[str, Any], accelerator: Any) -> str:
    """What is said when parameters are left whole: everything outside the decoder layers, as by a wrapper that skips modules, or all
    of a small model, as by DeepSpeed with its own defaults."""
    from trebuchet.strategies import fsdp2, zero3
    from trebuchet.strategies.layouts import LayoutError

    shard, settings = fsdp2.fully_shard, zero3.settings
    fsdp2.fully_shard = lambda module, **options: "Decoder" in type(module).__name__ and shard(module, **options)

    def defaults(*given: Any) -> dict[str, Any]:
        made = settings(*given)
        made["zero_optimization"].pop("stage3_param_persistence_threshold")
        return made

    zero3.settings = defaults
    try:
        start(name, cell, job, accelerator)
    except LayoutError as problem:
        return str(problem)
    finally:
        fsdp2.fully_shard, zero3.settings = shard, settings
    return "nothing was said"


def digests(layout: Any, wanted: Any = lambda name: ".base_layer." in name, *, packed: bool = True) -> dict[str, str]:
    """SHA-256 of every gathered tensor: of those in bytes (packed weights and scales), or of the others."""
    import hashlib

    import torch

    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in layout.whole(wanted)
        if (tensor.dtype == torch.uint8) == packed
    }


def trained(loop: Any) -> Any:
    return {name for name, p in loop.stepper.layout.inside.named_parameters() if p.requires_grad}.__contains__


def leave(loop: Any, **options: int) -> str:
    """The exported folder, with the logits that the model in memory gives on fixed ids."""
    import torch
    from trebuchet.training.export import export

    layout, session = loop.stepper.layout, loop.session
    layout.model.eval()
    with torch.no_grad(), loop.stepper.autocasting():
        logits = layout.model(input_ids=torch.arange(3, 35)[None], use_cache=False).logits.float()
    layout.rest()
    main = session.runtime.main
    path = export(session.runtime.folder, session.plan, session.base, layout, session.tokenizer, main=main, **options)
    if main:
        torch.save(logits, path / "logits.pt")
    return str(path)


def micro_batches(loop: Any, step: int) -> list[tuple[int, ...]]:
    from trebuchet.training.data import share

    return share(loop.order.batch(step), loop.runtime.rank, loop.runtime.world, loop.micro_batch)


def observe(layout: Any) -> dict[str, Any]:
    """What of the model is on this rank, read off the parameters and not off what the layout says of itself."""
    from torch.distributed.tensor import DTensor

    layout.rest()
    kinds, local, whole, four_bit, all_four_bit = set(), 0, 0, 0, 0
    for parameter in layout.inside.parameters():
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: the piece, and the parameter itself where it stays whole
            local += parameter.numel() * parameter.element_size()
            whole += (parameter.ds_numel - parameter.numel()) * parameter.element_size()
            mine = parameter.ds_tensor
        kinds.add(type(parameter).__name__)
        local += mine.numel() * mine.element_size()
        whole += parameter.numel() * parameter.element_size()
        if not mine.dtype.is_floating_point:
            four_bit += mine.numel()
            all_four_bit += getattr(parameter, "ds_numel", parameter.numel())
    sizes = {"local_bytes": local, "whole_bytes": whole, "packed_bytes": four_bit, "whole_packed_bytes": all_four_bit}
    return {"kinds": sorted(kinds), **sizes}


def rank_main(group: dict[str, Any], job: dict[str, Any], rank: int, port: int) -> None:
    world = group["world"]
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= (several | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}) if world > 1 else {}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    found = {}
    for name, cell in group["cells"].items():
        try:
            began = time.perf_counter()
            found[name] = run_cell(name, cell, job, accelerator)
            found[name]["seconds"] = round(time.perf_counter() - began, 2)  # for whoever looks for what a test costs
        except Exception:  # shown, and the run fails: see below
            print(f"rank {rank} of {world}, cell {name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # the other ranks wait in a collective
    Path(job["out"], f"{group.get('name', world)}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def main(path: str) -> int:
    """Imports once, then forks the ranks of each group; nothing here starts a thread before that."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import accelerate
    import bitsandbytes
    import deepspeed
    import peft
    import torch
    import transformers
    import trebuchet.training.session  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    assert all((accelerate, bitsandbytes, deepspeed, peft, transformers))
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    for group in job["groups"]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(group["world"]):
            if not (pid := os.fork()):
                rank_main(group, job, rank, port)
                sys.stdout.flush()
                os._exit(0)
            ranks.append(pid)
        if any([os.waitpid(pid, 0)[1] for pid in ranks]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
