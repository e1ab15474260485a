"""Notes from the practice of the field, each with its reason. They never block a run.

Figures are the commonly published rules of thumb (LoRA: Hu et al. 2021; QLoRA: Dettmers et al. 2023; LIMA: Zhou et al. 2023 on
a thousand curated examples), not limits of this program.
"""

from __future__ import annotations

from .model_spec import ModelSpec
from .plan import Chosen
from .schema import TrainConfig

RATES = {"full": (5e-6, 5e-5), "lora": (1e-4, 3e-4), "qlora": (5e-5, 2e-4)}


COMPARING = {
    "full": (1e-7, 1e-5),
    "lora": (1e-6, 1e-4),
    "qlora": (1e-6, 1e-4),
}  # the defaults and recipes of TRL and the papers


def rates(config: TrainConfig, method: str) -> tuple[float, float]:
    """Learning rates between which the objective usually works."""
    return (COMPARING if config.objective.name in ("dpo", "orpo", "simpo", "cpo", "kto") else RATES)[method]


def advice(config: TrainConfig, model: ModelSpec, ranks: int, chosen: Chosen | None, examples: int | None) -> list[str]:
    """Sentences; empty when nothing is out of the ordinary."""
    return list(_data(config, examples)) + list(_settings(config, model, ranks, chosen))


def _data(config: TrainConfig, examples: int | None) -> list[str]:
    out = []
    if examples is not None and examples < 500:
        out.append(
            f"{examples} training examples: fewer than 500 often overfit; try them in the prompt first, or collect about 1,000 good ones."
        )
    if config.objective.name == "pretrain":
        out.append(
            "training on plain text, for knowledge rather than behaviour: facts that are many, or change, are better looked up and put "
            "into the prompt (retrieval); fine-tuning is for style, format and ways of reasoning."
        )
    if config.data.eval == 0:
        out.append("no held-out rows (data.eval is 0): nothing will tell whether training helped.")
    if (
        examples is not None
        and examples > 50_000
        and config.optimization.epochs > 2
        and config.optimization.max_steps is None
    ):
        out.append(
            f"{examples:,} examples for {config.optimization.epochs:g} epochs: one or two passes are usual above 50,000."
        )
    return out


def _settings(config: TrainConfig, model: ModelSpec, ranks: int, chosen: Chosen | None) -> list[str]:
    out = []
    optimization, lora = config.optimization, config.strategy.lora
    if optimization.epochs > 5 and optimization.max_steps is None:
        out.append(f"{optimization.epochs:g} epochs: beyond 5 the held-out loss usually rises; watch it.")
    if optimization.global_batch_size < ranks:
        out.append(
            f"global batch {optimization.global_batch_size} on {ranks} ranks: some have no rows in any step; raise it to {ranks}."
        )
    if config.data.max_length > model.max_position_embeddings:
        out.append(
            f"data.max_length {config.data.max_length} is longer than the model's {model.max_position_embeddings} positions."
        )
    objective = config.objective
    if objective.name == "kto" and optimization.global_batch_size < 8:
        out.append(
            f"kto estimates how far the model has moved from the {optimization.global_batch_size} rows of a batch; 16 and more are usual."
        )
    if objective.reference == "copy":
        out.append("objective.reference copy holds the model twice; precomputed gives the same numbers without it.")
    if objective.name == "orpo" and config.strategy.method == "full":
        out.append("orpo has no reference that holds it back: 5e-6 to 8e-6 are usual rates for it in full fine-tuning.")
    if chosen is None:
        return out
    low, high = rates(config, chosen.method)
    if not low <= chosen.learning_rate <= high:
        side = "forgets" if chosen.learning_rate > high else "hardly learns"
        out.append(
            f"learning rate {chosen.learning_rate:g}: outside {low:g} to {high:g}, where {chosen.method} usually works; it {side}."
        )
    if chosen.method != "full" and lora.r > 64:
        out.append(f"rank {lora.r}: above 64 there is little more to gain for what it costs.")
    return out
