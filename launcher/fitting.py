"""One method on one layout: for each kind of checkpointing the largest micro-batch that fits, or the two numbers of the leanest try.

Left out: which methods and layouts are tried, and which of those that fit is taken (planner.py).
"""

from __future__ import annotations

from ..strategies.memory import MemoryRequest, estimate
from ..strategies.memory import needs as weigh
from .cells import cannot, spell
from .costing import Hardware, Layout, accumulate, memory, needs, optimizer, precision, request
from .model_spec import ModelSpec
from .plan import NOT_TIMED, Chosen, Rejected
from .schema import TrainConfig

CHECKPOINTING = ("none", "selective", "full")
LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
# Objectives that compare answers drift apart at such rates: the defaults of TRL for full fine-tuning, ten times that for adapters.
COMPARING_RATE = {"full": 1e-6, "lora": 1e-5, "qlora": 1e-5}
REWARD_RATE = {"full": 1e-5, "lora": 1e-4, "qlora": 1e-4}
# Tokens per forward pass beyond which a step gets no faster: matrix products are large enough on a GPU; on a CPU the working set
# outgrows the cache (4,096 was no faster than 2,048 tokens on 2 cores).
MICRO_TOKENS = {"cuda": 16384, "cpu": 2048}


def fit(
    config: TrainConfig, model: ModelSpec, hardware: Hardware, method: str, layout: Layout
) -> list[Chosen] | Rejected:
    """For each kind of checkpointing the largest micro-batch that fits; or the numbers of the leanest try."""

    def no(reason: str, needed: float | None = None, usable: float | None = None) -> Rejected:
        return Rejected(
            method=method,
            parallel=layout.parallel,
            offload=layout.offload,
            needed_gib=needed,
            usable_gib=usable,
            reason=f"{method}, {spell(layout)}: {reason}",
        )

    impossible = cannot(config, model, hardware, method, layout)
    if impossible:
        return no(impossible)
    process, host = 0.0, 0.0
    fits: list[Chosen] = []
    micros = micro_batches(config, hardware)
    for checkpointing in checkpointings(config):
        base = request(config, model, hardware, method, layout, checkpointing, micros[0])
        micro, process, host = largest(config, hardware, base, micros)
        if process <= hardware.usable_gib and host <= hardware.host_gib:
            fits.append(choose(config, hardware, method, layout, base.at(micro, accumulate(config, hardware, micro))))
    if fits:
        return fits
    if process > hardware.usable_gib:
        where = "on this machine" if hardware.device == "cpu" else f"on a {hardware.group.gpu}"
        return no(f"{process:.1f} GiB needed, {hardware.usable_gib:.1f} usable {where}", process, hardware.usable_gib)
    where = "of host memory on a node"
    return no(f"{host:.1f} GiB needed, {hardware.host_gib:.1f} usable {where}", host, hardware.host_gib)


def largest(
    config: TrainConfig, hardware: Hardware, base: MemoryRequest, micros: list[int]
) -> tuple[int, float, float]:
    """(micro-batch, GiB of a rank, GiB of a node's host memory): the largest of `micros` (falling) that fits, or else the smallest.

    Memory grows with the micro-batch, every term of it, as long as gradients stay between micro-batches either way; without
    accumulation they are not there yet at the loss, so that one is asked for itself. Of the others, if the smallest is too
    large then all are, and the largest that fits is found by halving (tests: every one asked gives the same).
    """

    def ask(micro: int) -> tuple[int, float, float]:
        return micro, *needs(hardware, *weigh(base.at(micro, accumulate(config, hardware, micro))))

    def fits(found: tuple[int, float, float]) -> bool:
        return found[1] <= hardware.usable_gib and found[2] <= hardware.host_gib

    best = ask(micros[0])
    if fits(best) or len(micros) == 1:
        return best
    best = ask(micros[-1])
    if not fits(best):
        return best
    too_large, low = 0, len(micros) - 1
    while low - too_large > 1:
        middle = (low + too_large) // 2
        found = ask(micros[middle])
        if fits(found):
            low, best = middle, found
        else:
            too_large = middle
    return best


def checkpointings(config: TrainConfig) -> tuple[str, ...]:
    wanted = config.strategy.checkpointing
    return CHECKPOINTING if wanted == "auto" else (wanted,)


def micro_batches(config: TrainConfig, hardware: Hardware) -> list[int]:
    """Candidates, largest first: the user's number, or powers of two that divide a rank's rows."""
    wanted = config.optimization.micro_batch
    if isinstance(wanted, int):
        return [wanted]
    rows = max(1, config.optimization.global_batch_size // hardware.ranks)
    most = max(1, MICRO_TOKENS[hardware.device] // (config.data.max_length * (2 if config.objective.pairs else 1)))
    return [m for m in (2**i for i in range(10, -1, -1)) if m <= most and rows % m == 0]


def choose(config: TrainConfig, hardware: Hardware, method: str, layout: Layout, asked: MemoryRequest) -> Chosen:
    rate = config.optimization.learning_rate
    values = {
        "method": method,
        "parallel": layout.parallel,
        "dp_replicate": layout.replicate,
        "dp_shard": layout.shard,
        "offload": layout.offload,
        "checkpointing": asked.checkpointing,
        "optimizer": optimizer(config),
        "precision": precision(config, hardware),
        "attention": "flash_attention_2" if asked.attention == "flash" else asked.attention,
        "learning_rate": usual_rate(config, method) if rate == "auto" else rate,
        "micro_batch": asked.micro_batch,
        "accumulation": asked.grad_accum,
        "device": hardware.device,
        "gpus": hardware.ranks if hardware.device == "cuda" else 0,
        "memory": memory(hardware, estimate(asked)),
        "time": NOT_TIMED,
        "cost": None,
    }
    return Chosen.model_validate(values)


def usual_rate(config: TrainConfig, method: str) -> float:
    name = config.objective.name
    return {"sft": LEARNING_RATE, "pretrain": LEARNING_RATE, "reward": REWARD_RATE}.get(name, COMPARING_RATE)[method]
