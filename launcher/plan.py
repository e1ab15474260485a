"""What the planner answers: the chosen strategy with its numbers, and every rejected one with the two numbers that rejected it.

Plain data. `plan.json` in a run folder is a `Plan`; the worker reads it and never plans again. How a plan is made is in
`planner.py`, how it is printed in `plan_text.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .cluster import Cluster
from .model_spec import ModelSpec
from .schema import TrainConfig

GIB = 2**30


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Memory(Data):
    """Predicted peak of one rank, and of one node's host memory."""

    peak_allocated_gib: float
    process_gib: float
    usable_gib: float
    host_gib: float
    components: dict[str, float]
    phases: dict[str, float] = {}  # live tensors of one rank at the peak of each phase, GiB


class Time(Data):
    """Predicted speed of the whole job, with the range that published utilisations span; None where nothing is known to predict
    from: no peak in the cluster file, a CPU, or (hours) data of unknown size."""

    tokens_per_s: float | None
    hours: float | None
    tokens_per_s_range: tuple[float, float] | None = None
    hours_range: tuple[float, float] | None = None


NOT_TIMED = Time(tokens_per_s=None, hours=None)


class Chosen(Data):
    """The strategy, complete: the worker needs nothing else to prepare the model."""

    method: Literal["full", "lora", "qlora"]
    parallel: Literal["none", "ddp", "fsdp2", "zero3"]
    dp_replicate: int
    dp_shard: int
    offload: Literal["none", "optimizer", "params"]
    checkpointing: Literal["none", "selective", "full"]
    optimizer: Literal["adamw", "adamw-8bit", "adamw-8bit-kernel", "paged-adamw-8bit"]
    precision: Literal["bf16-mixed", "fp16-mixed", "fp32"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    learning_rate: float
    micro_batch: int
    accumulation: int
    device: Literal["cpu", "cuda"]
    gpus: int
    memory: Memory
    time: Time
    cost: float | None
    elastic: tuple[int, int] | None = None  # fewest and most ranks; the plan is for the fewest

    def at_world(self, world: int, global_batch: int) -> Chosen:
        """The same strategy over `world` ranks of an elastic run: the global batch stays, accumulation follows."""
        sharded = self.parallel in ("fsdp2", "zero3")
        parallel = self.parallel if sharded else "none" if world == 1 else "ddp"
        return self.model_copy(
            update={
                "parallel": parallel,
                "dp_replicate": 1 if sharded else world,
                "dp_shard": world if sharded else 1,
                "accumulation": math.ceil(global_batch / (self.micro_batch * world)),
                "gpus": world if self.gpus else 0,
            }
        )

    @property
    def ranks(self) -> int:
        """Processes that train: one per GPU, or per CPU process."""
        return self.dp_replicate * self.dp_shard


class Rejected(Data):
    method: str
    parallel: str
    offload: str
    needed_gib: float | None
    usable_gib: float | None
    reason: str


class WayOut(Data):
    """What would fit when the plan does not: settings to change (dotted key -> value), and what the planner then chooses where."""

    set: dict[str, Any]
    cluster: str
    gpus: int
    method: str
    parallel: str
    offload: str
    needed_gib: float
    usable_gib: float


class Plan(Data):
    feasible: bool
    chosen: Chosen | None
    rejected: tuple[Rejected, ...]
    advice: tuple[str, ...]
    reasons: tuple[str, ...]
    config: TrainConfig
    model: ModelSpec
    cluster: Cluster
    nearest: WayOut | None = None
    smallest_cluster: WayOut | None = None

    def public(self) -> dict[str, Any]:
        """What `plan --json` prints; these keys are stable."""
        keep = {"feasible", "chosen", "rejected", "advice", "reasons"}
        keep |= set() if self.feasible else {"nearest", "smallest_cluster"}
        return {"model": self.model.name, "cluster": self.cluster.name, **self.model_dump(mode="json", include=keep)}
