"""The shape of a training YAML: one frozen model per section, each field with its default and its help.

Only shapes, defaults and limits live here; reading files, `--set` and error messages are in `config.py`. `auto` is always the
planner's to fill. Importing this loads pydantic and nothing heavier.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from .schema_base import Section, yaml_bool
from .schema_curate import CurateOrNot
from .schema_evaluation import Checkpointing, Evaluation
from .schema_sweep import Sweep

Auto = Literal["auto"]


class Model(Section):
    name: str = Field(min_length=1, description="Hub id or a folder in Hugging Face layout")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="dtype of the weights; auto: bf16 where the device has it"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: sdpa, or eager for the few models that have none (Gemma 2)"
    )
    trust_remote_code: bool = Field(False, description="run Python that comes with the model; off unless asked for")


class Source(Section):
    path: str = Field(
        min_length=1, description="file (.json .jsonl .parquet .csv), folder saved by datasets, or Hub id"
    )
    format: Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference", "kto"] = Field(
        "auto", description="layout of a row; auto: recognised from its columns"
    )
    subset: str | None = Field(None, description="configuration name of a Hub dataset")
    split: str = Field("train", description="split of a Hub or saved dataset")
    weight: float = Field(
        1.0, gt=0, description="share of the rows used; 2.0 repeats them twice, 0.5 takes a random half"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our column name -> the name in the file")


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


def expand_sources(value: Any) -> Any:
    """A path, a mapping, or a list of either."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


# One number, or sources: decided before validation, so that an error speaks of the one that was meant.
EvalRows = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("share")]
    | Annotated[Sources, BeforeValidator(expand_sources), Tag("sources")],
    Discriminator(lambda value: "share" if isinstance(value, (int, float)) else "sources"),
]


Role = Annotated[str, Field(min_length=1)]


class General(Section):
    path: Annotated[Sources, BeforeValidator(expand_sources)] = Field(
        description="rows of other tasks, against forgetting: a source or several, as in data.train"
    )
    share: float = Field(0.1, gt=0, lt=1, description="share of all training rows that they make up")

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.path


class Data(Section):
    train: Annotated[Sources, BeforeValidator(expand_sources)] = Field(description="training rows")
    eval: EvalRows = Field(
        0.05, description="held-out rows: sources of their own, or a share of the training rows; 0 for none"
    )
    max_length: int = Field(2048, ge=8, description="tokens per row")
    packing: bool = Field(True, description="several samples in one row, without attention between them")
    chat_template: str | None = Field(
        None, description="a Jinja file, or a template by name; default: the tokenizer's own"
    )
    train_on: Literal["assistant", "all"] | Annotated[tuple[Role, ...], Field(min_length=1)] = Field(
        "assistant",
        description="which tokens carry loss: the assistant's turns, all, or a list of roles; a message's own `train: false` or "
        "`weight: 0` wins",
    )
    max_truncated: float = Field(
        0.05, ge=0, le=1, description="largest share of samples that may be cut at max_length before the run refuses"
    )
    skip_bad_rows: bool = Field(
        False, description="leave out rows that cannot be read, and list them, instead of refusing"
    )
    general: General | None = Field(None, description="general data mixed in: {path, share}")
    curate: CurateOrNot = Field(
        None, description="remove duplicates, damaged and leaking rows before training; true: the defaults below"
    )


PREFERENCES = ("dpo", "orpo", "simpo", "cpo", "reward")  # objectives whose rows are pairs
WITH_REFERENCE = ("dpo", "kto")


class Objective(Section):
    name: Literal["sft", "pretrain", "dpo", "orpo", "simpo", "cpo", "kto", "reward"] = Field(
        "sft",
        description="sft: loss on the answer; pretrain: on every token of plain text; dpo, orpo, simpo, cpo: pairs of a chosen and "
        "a rejected answer; kto: single answers with a label; reward: a score model from pairs",
    )
    loss: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="shape of the loss of a pair; dpo and cpo")
    beta: Auto | Annotated[float, Field(gt=0)] = Field(
        "auto", description="strength of the comparison; auto: 0.1, for simpo 2.0"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs taken to be labelled the wrong way round; sigmoid loss of dpo and cpo",
    )
    gamma: float = Field(0.5, ge=0, description="margin that the chosen answer must win by; simpo")
    sft_weight: Auto | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="weight of the loss on the chosen answer's tokens beside that of the pair; auto: 1.0 for cpo, else 0; dpo and cpo",
    )
    desirable_weight: float = Field(1.0, ge=0, description="weight of rows with label true; kto")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of rows with label false; kto")
    center: float = Field(
        0.0, ge=0, description="weight of the squared sum of the two scores, which keeps scores around 0; reward"
    )
    reference: Literal["auto", "adapters_off", "precomputed", "copy"] = Field(
        "auto",
        description="where the log-probabilities of the untrained model come from: its adapters switched off, computed once before "
        "training, or a second copy in memory; auto: adapters_off for lora and qlora, precomputed for full; dpo and kto",
    )

    @property
    def beta_value(self) -> float:
        return (2.0 if self.name == "simpo" else 0.1) if self.beta == "auto" else self.beta

    @property
    def sft_weight_value(self) -> float:
        """orpo is that loss plus beta times the odds ratio's; simpo and reward have none."""
        if self.name == "orpo":
            return 1.0
        return (1.0 if self.name == "cpo" else 0.0) if self.sft_weight == "auto" else self.sft_weight

    def reference_for(self, method: str) -> str | None:
        """adapters_off, precomputed or copy for a method (full, lora, qlora); None for an objective without a reference."""
        if self.name not in WITH_REFERENCE:
            return None
        if self.reference == "auto":
            return "precomputed" if method == "full" else "adapters_off"
        return self.reference

    @property
    def pairs(self) -> bool:
        """A row is a chosen and a rejected answer, and counts as two in a forward pass."""
        return self.name in PREFERENCES

    @model_validator(mode="after")
    def _only_what_applies(self) -> Objective:
        """A key of another objective would be ignored without a word; the defaults, written out, do no harm."""
        for key, names in _APPLIES.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to {' and '.join(names)}; objective {self.name} has no such key")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss sigmoid, not {self.loss}")
        return self


_APPLIES = {
    "loss": ("dpo", "cpo"),
    "beta": ("dpo", "orpo", "simpo", "cpo", "kto"),
    "label_smoothing": ("dpo", "cpo"),
    "gamma": ("simpo",),
    "sft_weight": ("dpo", "cpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "center": ("reward",),
    "reference": WITH_REFERENCE,
}


class Lora(Section):
    r: int = Field(16, ge=1, le=1024, description="rank")
    alpha: int = Field(32, ge=1, description="scaling is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="all-linear, or names of linear modules"
    )


class Quant(Section):
    type: Literal["nf4", "int8"] = Field(
        "nf4", description="how qlora stores the frozen base: 4-bit NormalFloat, or LLM.int8 (one device and ddp)"
    )
    double: bool = Field(True, description="nf4: quantize the scales too (0.516 instead of 0.5625 bytes per weight)")


class StrategyChoice(Section):
    method: Literal["auto", "full", "lora", "qlora"] = Field("auto", description="what is trained")
    parallel: Literal["auto", "none", "ddp", "fsdp2", "zero3"] = Field("auto", description="how it is spread over GPUs")
    dp_replicate: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="fsdp2: copies of the sharded model, each over ranks / copies; auto: one"
    )
    offload: Literal["auto", "none", "optimizer", "params"] = Field("auto", description="what lives in host memory")
    checkpointing: Literal["auto", "none", "selective", "full"] = Field("auto", description="activation checkpointing")
    lora: Lora = Lora()
    quant: Quant = Quant()
    kernels: Annotated[Literal["auto", "on", "off"], BeforeValidator(yaml_bool)] = Field(
        "auto", description="the Triton layer; auto: on, and on a GPU a run without it fails"
    )


class Optimization(Section):
    global_batch_size: int = Field(16, ge=1, description="rows per optimizer step over all ranks")
    micro_batch: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="rows per forward pass per rank")
    learning_rate: Auto | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto", description="auto: 2e-4 for adapters, 2e-5 for full; a tenth and less for preferences"
    )
    epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="instead of epochs")
    optimizer: Literal["auto", "adamw", "adamw-8bit", "adamw-8bit-kernel", "paged-adamw-8bit"] = Field(
        "auto",
        description="auto: torch's AdamW; adamw-8bit and paged-adamw-8bit: bitsandbytes; adamw-8bit-kernel: the same states, "
        "stepped by the kernel layer",
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, description="share of the steps when below 1, else a number of steps")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _warmup(self) -> Optimization:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("warmup is a share below 1 or a whole number of steps")
        return self


class RunBudget(Section):
    hours: float | None = Field(
        None, gt=0, description="the method of highest fidelity that is done by then, by the planner's own estimate"
    )
    cost: float | None = Field(
        None, gt=0, description="the same for the price, in the currency of the cluster file's price_per_gpu_hour"
    )


class ClusterRef(Section):
    name: str = Field("local", min_length=1, description="a name in cluster_configs/ or the path of a cluster YAML")
    processes: int | None = Field(
        None, ge=1, description="ranks on each node; default: one for each GPU, or one on a CPU"
    )


class TrainConfig(Section):
    """What the user wrote, checked. Two keys are enough: model and data."""

    model: Model
    data: Data
    objective: Objective = Objective()
    strategy: StrategyChoice = StrategyChoice()
    optimization: Optimization = Optimization()
    budget: RunBudget = RunBudget()
    evaluation: Evaluation = Evaluation()
    checkpointing: Checkpointing = Checkpointing()
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "swanlab"], ...] = Field(
        ("tensorboard",), description="trackers beside metrics.jsonl"
    )
    output: str = Field(min_length=1, description="the run folder; default runs/NAME-OF-THE-YAML")
    cluster: ClusterRef = ClusterRef()
    sweep: Sweep | None = Field(None, description="many runs of this one with some keys varied; see sweeps.md")


# A section written as one word or path means this key of it.
SHORTHAND = {"model": "name", "data": "train", "objective": "name", "strategy": "method", "cluster": "name"}
