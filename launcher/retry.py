"""What a run that went out of memory tries next: one lighter plan, or none. Pure, and the same for every scheduler.

    1. half the micro-batch, and the accumulation that makes up for it
    2. stronger activation checkpointing: none, selective, full
    3. more in host memory: optimizer states, then parameters, where the layout shards (fsdp2, zero3) and the device is a GPU

The global batch is the user's and stays; so do method, layout and optimizer, because checkpoints of this run hold their states.
Left out: whether it was the host that ran out (slurm/classify.py), and starting the next attempt.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..strategies.memory import estimate
from .cells import cannot
from .costing import Hardware, Layout, accumulate, memory, request
from .fitting import CHECKPOINTING
from .plan import Chosen, Plan
from .planner import hardware_of

OFFLOAD = ("none", "optimizer", "params")


def lighter(plan: Plan) -> Plan | None:
    """The plan of the next attempt; None when nothing lighter is left. Every rung shrinks (micro-batch, checkpointing, offload) in
    that order, so a run ends after at most log2(micro-batch) + 4 of them."""
    chosen = plan.chosen
    assert chosen is not None
    hardware = hardware_of(plan.config, plan.cluster)
    for rung in _rungs(chosen):
        layout = Layout(rung.parallel, rung.offload, rung.dp_replicate, rung.dp_shard)
        if rung.offload != chosen.offload and not _can_offload(plan, hardware, rung, layout):
            continue
        asked = request(
            plan.config, plan.model, hardware, rung.method, layout, rung.checkpointing, rung.micro_batch
        )  # for the record; the formula has been wrong once, so it does not decide
        rung = rung.model_copy(
            update={
                "memory": memory(hardware, estimate(asked)),
                "accumulation": accumulate(plan.config, hardware, rung.micro_batch),
            }
        )
        reasons = (*plan.reasons, f"out of memory: {words(chosen, rung)}")
        return plan.model_copy(update={"chosen": rung, "reasons": reasons})
    return None


def words(before: Chosen, after: Chosen) -> str:
    """What changes between two attempts, as half a sentence."""
    changes = [
        f"{name.replace('_', '-')} {getattr(after, name)} instead of {getattr(before, name)}"
        for name in ("micro_batch", "accumulation", "checkpointing", "offload")
        if getattr(after, name) != getattr(before, name)
    ]
    return ", ".join(changes)


def sentence(before: Plan, after: Plan) -> str:
    """How a run goes on with the next plan, for the record and the screen."""
    assert before.chosen is not None and after.chosen is not None
    return f"Goes on with {words(before.chosen, after.chosen)}, and the same global batch."


def _rungs(chosen: Chosen) -> Iterator[Chosen]:
    if chosen.micro_batch > 1:
        yield chosen.model_copy(update={"micro_batch": chosen.micro_batch // 2})
    for stronger in CHECKPOINTING[CHECKPOINTING.index(chosen.checkpointing) + 1 :]:
        yield chosen.model_copy(update={"checkpointing": stronger})
    for further in OFFLOAD[OFFLOAD.index(chosen.offload) + 1 :]:
        yield chosen.model_copy(update={"offload": further})


def _can_offload(plan: Plan, hardware: Hardware, rung: Chosen, layout: Layout) -> bool:
    sharded = rung.parallel in ("fsdp2", "zero3") and hardware.device == "cuda"
    return sharded and cannot(plan.config, plan.model, hardware, rung.method, layout) is None
