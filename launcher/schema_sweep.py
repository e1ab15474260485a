"""The `sweep:` section of a training YAML: which keys vary, how, and what trials are ordered by.

What it expands to is in sweep_space.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .schema_base import Section


class Values(Section):
    """Where the values of one key come from: one of these."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="one of the list; the only one a grid takes")
    uniform: tuple[float, float] | None = Field(None, description="from the first to the second")
    log_uniform: tuple[float, float] | None = Field(None, description="the same in the logarithm, such as [1e-5, 1e-3]")
    int_uniform: tuple[int, int] | None = Field(None, description="whole numbers, both ends included")

    @model_validator(mode="after")
    def _one_range(self) -> Values:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(Values.model_fields)}")
        ends = self.uniform or self.log_uniform or self.int_uniform
        if ends and not ends[0] < ends[1]:
            raise ValueError(f"the first end must be below the second, not {ends[0]:g} and {ends[1]:g}")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs positive ends")
        return self


class Stopping(Section):
    """Trials that are not worth going on with end early, where the scheduler can see them together: on Ray."""

    name: Literal["asha", "median"] = Field(
        "asha", description="asynchronous successive halving, or worse than the median"
    )
    grace: float = Field(0.2, gt=0, lt=1, description="share of a trial that it may always run")
    factor: int = Field(3, ge=2, description="asha: one of so many goes on at each rung")


class Budget(Section):
    """When one of these is used up no trial starts any more, and those that run save a checkpoint and end."""

    hours: float | None = Field(None, gt=0, description="hours in which trials run, however many at a time")
    price: float | None = Field(None, gt=0, description="GPU hours of all trials by the cluster's price_per_gpu_hour")


class Sweep(Section):
    """Many runs that differ in some keys; `trebuchet sweep` starts them."""

    space: dict[str, Values] = Field(
        min_length=1,
        description="dotted key -> `{choice: […]}`, `{uniform: [a, b]}`, `{log_uniform: [a, b]}`, `{int_uniform: [a, b]}`",
    )
    method: Literal["grid", "random", "optuna"] = Field(
        "random", description="grid: every combination of choices; optuna: learns from finished trials, not on Slurm"
    )
    trials: int | None = Field(None, ge=1, le=100_000, description="how many; a grid takes all of its points")
    metric: str = Field(
        "eval_loss",
        min_length=1,
        description="what trials are ordered by: eval_loss, eval_perplexity, or a key of metrics.jsonl",
    )
    mode: Literal["min", "max"] = Field("min", description="whether less or more of it is better")
    parallel: int = Field(50, ge=1, description="trials that run at the same time")
    nodes: int | None = Field(None, ge=1, description="nodes of one trial, on Ray; default: the fewest that it fits on")
    seed: int = Field(0, ge=0, description="of the values drawn; every trial keeps optimization.seed")
    budget: Budget = Field(Budget(), description="what all trials together may use")
    stopping: Stopping | None = Field(None, description="end poor trials early, on Ray; elsewhere each runs to its end")

    @model_validator(mode="after")
    def _method(self) -> Sweep:
        if self.method != "grid" and self.trials is None:
            raise ValueError(f"method {self.method} needs trials: N")
        if self.method == "grid":
            ranges = [path for path, values in self.space.items() if values.choice is None]
            if ranges:
                raise ValueError(f"a grid takes choices only, and {', '.join(ranges)} is a range; use method: random")
        return self
