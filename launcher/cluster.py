"""`Cluster`: what hardware there is, from a YAML in `cluster_configs/`, a YAML of the user's, or this machine.

A cluster file says how many nodes of which kind; what a GPU type is worth comes from `gpus.json`. Left out: asking
Slurm or Ray for their nodes, and the meaning of the `slurm` and `ray` settings, which belong to those schedulers' own
modules.

Units: GiB are 2^30 bytes; `_gbps` are 10^9 bytes (not bits) per second and GPU in one direction; TFLOP/s are dense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ClusterError, did_you_mean

CONFIGS = Path(__file__).resolve().parent.parent / "cluster_configs"
THIS_MACHINE = "this-machine"
DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp8")
MARKS = ("data sheet", "measured", "list price", "example")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NodeGroup(_Frozen):
    """Nodes of one kind. `gpu: null` with `gpus_per_node: 0` is a CPU machine.

    `gpu_memory_gib` is the total that PyTorch sees on one device, below the number on the box. `gpu_reserved_gib` and
    `host_reserved_gib` are what others use of it: other processes, the desktop, the file cache's floor. `sources` says
    per key where its number is from: "data sheet …", "measured …", "list price …" or "example …".
    """

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    gpu: str | None = None
    gpu_memory_gib: float | None = Field(None, gt=0)
    gpu_reserved_gib: float = Field(0.0, ge=0)
    peak_tflops: dict[str, float] = Field(default_factory=dict)
    memory_bandwidth_gbps: float | None = Field(None, gt=0)
    capability: str | None = None
    host_memory_gib: float = Field(gt=0)
    host_reserved_gib: float = Field(0.0, ge=0)
    cores: int = Field(ge=1)
    intra_node_gbps: float | None = Field(None, gt=0)
    inter_node_gbps: float | None = Field(None, gt=0)
    price_per_gpu_hour: float | None = Field(None, ge=0)
    sources: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> NodeGroup:
        for key, source in self.sources.items():
            if key not in type(self).model_fields or not source.startswith(MARKS):
                raise ValueError(f"sources.{key}: a key of the group, and where its number is from: {', '.join(MARKS)}")
        if any(peak <= 0 for peak in self.peak_tflops.values()) or not set(self.peak_tflops) <= set(DTYPES):
            raise ValueError(f"peak_tflops holds positive numbers for some of {', '.join(DTYPES)}")
        if (self.gpus_per_node > 0) != (self.gpu is not None):
            raise ValueError("gpu and gpus_per_node go together; leave both out for a machine without GPUs")
        if self.gpu is not None and self.gpu_memory_gib is None:
            raise ValueError(f"gpu '{self.gpu}' needs gpu_memory_gib, because it is not in the table of known types")
        if self.gpu_memory_gib is not None and self.gpu_reserved_gib >= self.gpu_memory_gib:
            raise ValueError("gpu_reserved_gib leaves nothing of gpu_memory_gib")
        if self.host_reserved_gib >= self.host_memory_gib:
            raise ValueError("host_reserved_gib leaves nothing of host_memory_gib")
        return self

    @property
    def gpus(self) -> int:
        """GPUs of the whole group."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_gpu_gib(self) -> float:
        """GiB of one GPU that a training process can have, its CUDA context included; 0 without GPUs."""
        return (self.gpu_memory_gib or 0.0) - (self.gpu_reserved_gib if self.gpu else 0.0)

    @property
    def usable_host_gib(self) -> float:
        """GiB of host memory of one node for all its training processes together."""
        return self.host_memory_gib - self.host_reserved_gib

    def supports(self, dtype: Literal["bf16", "fp16", "fp32"]) -> bool:
        """Whether the hardware multiplies in this dtype: a CPU in fp32 and bf16, unless its `capability` says fp32; a GPU by its
        compute capability (bf16 from 8.0 on), one without a capability as its `peak_tflops` say."""
        if self.gpu is None:
            return dtype == "fp32" or (dtype == "bf16" and self.capability != "fp32")
        if dtype == "bf16" and self.capability and self.capability[0].isdigit():
            return float(self.capability) >= 8
        return dtype in self.peak_tflops or self.capability is not None


class Cluster(_Frozen):
    """Node groups and how jobs get there. `slurm` and `ray` hold site settings as they are written."""

    name: str = Field(min_length=1)
    scheduler: Literal["local", "slurm", "ray"] = "local"
    groups: tuple[NodeGroup, ...] = Field(min_length=1)
    slurm: dict[str, Any] = Field(default_factory=dict)
    ray: dict[str, Any] = Field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """GPUs over all groups."""
        return sum(group.gpus for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cluster:
        return cls.model_validate(data)


def load_cluster(name_or_path: str) -> Cluster:
    """A cluster by its name in `cluster_configs/`, from a YAML file (anything with a slash or the suffix .yaml or .yml), or asked
    for what it has (`slurm:PARTITION[:GPU]`, `ray:ADDRESS[:GPU]`).

    Raises ClusterError for an unknown name, with the nearest one, and for a wrong file with every wrong key at once.
    """
    if name_or_path.startswith(("slurm:", "ray:")):
        from .inventory import ask

        return ask(name_or_path)
    path = Path(name_or_path).expanduser()
    if "/" not in name_or_path and path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{name_or_path}.yaml"
        if not path.is_file():
            hint = did_you_mean(name_or_path, cluster_names())
            raise ClusterError(
                f"there is no cluster '{name_or_path}' in cluster_configs/{hint} (or give the path of a YAML)"
            )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ClusterError(f"cannot read the cluster file {path}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        raise ClusterError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    return build_cluster(tree, source=str(path), default_name=path.stem)


def build_cluster(tree: Any, *, source: str, default_name: str) -> Cluster:
    """The same from a mapping. `groups: this-machine` stands for the groups of `this_machine()`."""
    if not isinstance(tree, dict):
        raise ClusterError(f"{source}: a cluster file holds keys and values, scheduler and groups before all")
    tree = {"name": default_name, **tree}
    if tree.get("groups") == THIS_MACHINE:
        tree["groups"] = [group.model_dump() for group in this_machine().groups]
    elif isinstance(tree.get("groups"), list):
        tree["groups"] = [_with_gpu_type(group, f"{source}: groups.{i}") for i, group in enumerate(tree["groups"])]
    try:
        return Cluster.model_validate(tree)
    except ValidationError as error:
        problems = list(_problems(error))
        many = f"{len(problems)} problems:" + "".join(f"\n  {problem}" for problem in problems)
        raise ClusterError(f"{source}: {problems[0] if len(problems) == 1 else many}") from None


def this_machine() -> Cluster:
    """This machine as a cluster: GPUs by NVML, cores and memory as this process may use them."""
    from .machine import inventory

    return Cluster(name="local", scheduler="local", groups=tuple(NodeGroup(**group) for group in inventory()))


def cluster_names() -> list[str]:
    """The names in `cluster_configs/`."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@cache
def gpu_types() -> dict[str, dict[str, Any]]:
    """The known GPU types: name -> the keys of a NodeGroup that follow from the type, with `sources`."""
    rows = json.loads((Path(__file__).parent / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    return {name: {k: v for k, v in row.items() if k != "nvml"} for name, row in rows.items()}


def _with_gpu_type(group: Any, where: str) -> Any:
    """Fills what follows from a known GPU type; keys of the file win."""
    if not isinstance(group, dict) or not isinstance(group.get("gpu"), str):
        return group
    known = gpu_types().get(group["gpu"])
    if known is None:
        if "gpu_memory_gib" in group:
            return group
        hint = did_you_mean(group["gpu"], gpu_types())
        advice = "For another type write its gpu_memory_gib and peak_tflops"
        raise ClusterError(f"{where}.gpu: '{group['gpu']}' is not a known type{hint} {advice}")
    sources = {k: v for k, v in known["sources"].items() if k not in group} | (group.get("sources") or {})
    return {**known, **group, "sources": sources}


def _problems(error: ValidationError) -> Iterator[str]:
    """One sentence per wrong key, with its dotted path and the nearest valid key."""
    broken_groups = any(len(item["loc"]) > 1 for item in error.errors())
    for item in error.errors():
        if item["type"] == "too_short" and broken_groups:  # pydantic counts the groups that were right
            continue
        path = [str(part) for part in item["loc"]]
        where = ".".join(path) or "the file"
        if item["type"] == "extra_forbidden":
            fields = NodeGroup.model_fields if path[0] == "groups" else Cluster.model_fields
            yield f"{where}: unknown key{did_you_mean(path[-1], fields)}"
        elif item["type"] == "missing":
            yield f"{where}: missing"
        elif item["type"] == "value_error":
            yield f"{where}: {item['msg'].removeprefix('Value error, ')}"
        else:
            text = item["msg"].split(", unable")[0].removeprefix("Input should be ").replace("a valid tuple", "a list")
            text = text.replace("a valid integer", "a whole number").replace("a valid ", "a ")
            yield f"{where}: must be {text}, not {item['input']!r}"
