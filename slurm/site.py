"""What a site asks for: the `slurm:` mapping of a cluster file, checked. The only place where site facts enter a job.

Values are single words or lists; nothing here is expanded by a shell except `setup`, whose lines are shell by purpose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..launcher.errors import ClusterError, did_you_mean
from . import options

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"(?i)(token|secret|passw|api_?key|credential)")
TIME = re.compile(r"\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED")


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_line(value: str) -> str:
    if any(ord(c) < 32 for c in value):
        raise ValueError("holds a line break or another control character")
    return value


Word = Annotated[str, Field(min_length=1), BeforeValidator(lambda v: _one_line(v) if isinstance(v, str) else v)]
Words = Annotated[tuple[Word, ...], BeforeValidator(_list)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Container(_Frozen):
    """Where Python runs when not on the host. Pyxis: an image for `srun --container-image`; Apptainer: a .sif file."""

    image: Word
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: Words = ()
    options: Words = Field(
        (), description="further options of the runtime as they stand, such as --container-writable or --nvccli"
    )


class Site(_Frozen):
    account: Word | None = None
    partition: Words = Field((), description="one or several; Slurm takes the one that starts first")
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    exclude: Words = ()
    nodelist: Words = ()
    time: Word | None = Field(
        None, description="limit of one attempt, as sbatch takes it; the run goes on after it by itself"
    )
    memory: Word | None = Field(None, description="--mem of one node, such as 480G; 0 for all of it")
    cpus_per_task: int | None = Field(None, ge=1, description="default: the node's cores over its ranks")
    exclusive: bool = False
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gpu_type: Word | None = Field(None, description="the site's own name of the GPU type, as in gpu:a100")
    python: Word | None = Field(
        None, description="default: the Python that submits, and python3 in a container or an activated environment"
    )
    modules: Words = Field((), description="`module load` of each, in order")
    venv: Word | None = Field(None, description="folder of a virtual environment to activate")
    conda: Word | None = Field(None, description="name or prefix of a conda environment to activate")
    setup: Words = Field((), description="shell lines, run as they stand before anything of ours")
    container: Container | None = None
    environment: dict[str, str] = Field(default_factory=dict, description="variables of the ranks; no secrets")
    secrets: dict[str, Word] = Field(
        default_factory=dict, description="variable -> file that holds its value, read on the node"
    )
    cache: Word | None = Field(
        None, description="folder on the shared file system for models (HF_HOME) and tokenized data"
    )
    node_local: Word | None = Field(
        None, description="folder on every node's own disk for compiler caches; default $TMPDIR, else /tmp"
    )
    requeue: bool = True
    warning_s: int | None = Field(
        None,
        ge=10,
        le=65535,
        description="seconds before the time limit at which ranks save; default: from the save time",
    )
    restarts: int = Field(
        3, ge=0, description="requeues after failures of nodes or ranks; preemption and time limits are not counted"
    )
    extra: Words = Field((), description="further options of sbatch as they stand")
    srun: Words = Field((), description="further options of srun as they stand")

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 reads 24:00:00 as the number 86400
            raise ValueError('write the time in quotes, such as "24:00:00"; YAML reads it as a number otherwise')
        if isinstance(value, str) and not TIME.fullmatch(value):
            raise ValueError(f"'{value}' is not a time of sbatch; write minutes, H:M:S or D-H:M:S")
        return value

    @field_validator("environment", "secrets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str) or not VARIABLE.fullmatch(name):
                raise ValueError(f"'{name}' is not a name of an environment variable")
        return {k: v if isinstance(v, str) else str(v) for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if SECRET.search(name) and name != "TOKENIZERS_PARALLELISM":
                raise ValueError(
                    f"{name} looks like a secret, and this file and the job script are readable by others; put the "
                    f"value into a file of your own and name it: secrets: {{{name}: ~/FILE}}"
                )
        return value

    @field_validator("extra", "srun")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        known, program = (options.SBATCH, "sbatch") if info.field_name == "extra" else (options.SRUN, "srun")
        found = options.problems(value, known, program)
        if found:
            raise ValueError("; ".join(found))
        return value


def build_site(settings: Mapping[str, Any], source: str) -> Site:
    """The checked settings. Raises ClusterError with every problem at once; `source` names the cluster."""
    try:
        return Site.model_validate(dict(settings))
    except ValidationError as error:
        found = [_sentence(item) for item in error.errors()]
        many = f"{len(found)} problems:" + "".join(f"\n  {problem}" for problem in found)
        raise ClusterError(f"{source}: {found[0] if len(found) == 1 else many}") from None


def _sentence(item: Any) -> str:
    path = ["slurm", *(str(part) for part in item["loc"])]
    where = ".".join(path)
    if item["type"] == "extra_forbidden":
        fields = Container.model_fields if path[1] == "container" else Site.model_fields
        name = path[-1].replace("-", "_")
        if name not in fields and path[-1] in options.SBATCH:
            return f"{where}: not a key of its own; write it as extra: [--{path[-1]}=…]"
        return f"{where}: unknown key{did_you_mean(name, fields)}"
    text = (
        item["msg"]
        .removeprefix("Value error, ")
        .split(", unable")[0]
        .removeprefix("Input should be ")
        .replace("a valid ", "a ")
    )
    return f"{where}: {text}" if item["type"] == "value_error" else f"{where}: must be {text}, not {item['input']!r}"
