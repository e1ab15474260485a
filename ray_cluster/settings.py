"""The `ray:` section of a cluster file, checked. Left out: what the nodes are made of, which is in `groups`.

provider: local       nodes are `ray start` processes of this machine, started and ended by Ray's autoscaler
          slurm       nodes are Slurm jobs (slurm/ray_nodes.py); the `slurm:` section says how they are asked for
          existing    a cluster that others keep; `address` and `dashboard` say where it is
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..launcher.errors import ClusterError, did_you_mean


class RaySettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Literal["local", "slurm", "existing"] = "local"
    workers: int | tuple[int, int] | None = Field(
        None, description="ranks; two numbers make the run elastic; default: the plan's"
    )
    min_nodes: int = Field(0, ge=0, description="nodes that stay when nothing asks for them")
    max_nodes: int | None = Field(None, ge=1, description="default: the nodes of the group")
    idle_s: float = Field(60.0, gt=0, description="seconds without work after which a node is given back")
    restarts: int = Field(
        3, ge=0, description="failures of ranks or nodes after which a run goes on; resizes are not counted"
    )
    address: str | None = Field(None, description="host:port of an existing cluster's head")
    dashboard: str | None = Field(None, description="http://host:port of its dashboard, where jobs are handed in")
    token_file: Path | None = Field(None, description="its authentication token")
    object_store_gib: float = Field(
        0.1, gt=0.07, description="shared memory of a node for Ray's objects; runs use little"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="of every rank")

    @model_validator(mode="after")
    def _whole(self) -> RaySettings:
        if (self.provider == "existing") != (self.address is not None and self.dashboard is not None):
            raise ValueError("address and dashboard belong to provider: existing, and it needs both")
        if isinstance(self.workers, tuple) and not 1 <= self.workers[0] <= self.workers[1]:
            raise ValueError("workers: [least, most], with 1 <= least <= most")
        if isinstance(self.workers, int) and self.workers < 1:
            raise ValueError("workers must be at least 1")
        return self

    @property
    def ranks(self) -> tuple[int, int] | None:
        """Fewest and most ranks of a run, the same number twice when it is fixed; None leaves it to the plan."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def elastic(self) -> tuple[int, int] | None:
        """Fewest and most ranks of an elastic run; None when the number is fixed."""
        return self.workers if isinstance(self.workers, tuple) else None


def ray_settings(tree: dict[str, Any], cluster: str) -> RaySettings:
    """Raises ClusterError with every wrong key and the nearest right one."""
    try:
        return RaySettings.model_validate(tree)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                problems.append(f"ray.{key}: unknown key{did_you_mean(str(item['loc'][-1]), RaySettings.model_fields)}")
            else:
                problems.append(f"ray{'.' + key if key else ''}: {item['msg'].removeprefix('Value error, ')}")
        raise ClusterError(f"{cluster}: {'; '.join(problems)}") from None
