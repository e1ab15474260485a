"""The plan of a run that goes on with other ranks or in another layout: `trebuchet resume RUN --set cluster.processes=2`.

What is trained stays: method, data, global batch, learning rate, optimizer, precision, seed. How it is spread may change, and the
checkpoint is read by as many ranks as there are then. Left out: reading it (strategies/sharded_states.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import build_config
from .errors import ConfigError, NothingFits, RunError
from .plan import Chosen, Plan
from .planner import make_plan
from .run_folder import RunFolder

MAY_CHANGE = (
    "cluster.processes",
    "strategy.parallel",
    "strategy.dp_replicate",
    "strategy.offload",
    "strategy.checkpointing",
    "optimization.micro_batch",
    "evaluation.",
    "checkpointing.",
)


def replan(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan with `overrides`, made anew for the run's own cluster. Raises ConfigError for a key that would train something else,
    NothingFits when the new ranks cannot hold it."""
    wrong = [o for o in overrides if not o.startswith(MAY_CHANGE)]
    if wrong:
        keys = ", ".join(key.rstrip(".") for key in MAY_CHANGE)
        raise ConfigError([f"{wrong[0]}: a resumed run trains what it did; resume may change {keys}"])
    chosen = plan.chosen
    assert chosen is not None
    tree = plan.config.model_dump(mode="json")
    tree["strategy"] |= {"method": chosen.method, "parallel": "auto", "offload": "auto"}
    tree["optimization"] |= {
        "learning_rate": chosen.learning_rate,
        "optimizer": chosen.optimizer,
        "micro_batch": "auto",
    }
    tree["model"] |= {"dtype": chosen.precision.removesuffix("-mixed"), "attention": chosen.attention}
    made = make_plan(build_config(tree, overrides), plan.model, plan.cluster)
    if made.chosen is None:
        reasons = "; ".join(r.reason for r in made.rejected[-3:])
        raise NothingFits(f"the run does not fit that way: {reasons}.", made)
    if chosen.optimizer != "adamw" and _shards(chosen) != _shards(made.chosen):
        raise ConfigError(
            [
                f"{overrides[0]}: the 8-bit optimizer states of this run belong to the rows of {chosen.ranks} ranks under "
                f"{chosen.parallel}, and their blocks cannot be cut or joined; resume on as many ranks in the same layout"
            ]
        )
    return made.model_copy(update={"reasons": (*made.reasons, f"resumed with {', '.join(overrides)}")})


def _shards(chosen: Chosen) -> tuple[int, int] | None:
    """None for layouts with a whole copy on each rank: how many there are does not matter to their states."""
    return (chosen.dp_replicate, chosen.dp_shard) if chosen.parallel in ("fsdp2", "zero3") else None


def readable_by(decided: Plan, folder: RunFolder) -> Plan:
    """The plan. RunError when a checkpoint of the run is of the other kind: before its plan is replaced by one that could never go on."""
    assert decided.chosen is not None
    wanted = decided.chosen.parallel
    for path in sorted(folder.checkpoints.glob("step-*")):
        flat = any(path.glob("zero3-*.safetensors"))
        if flat != (wanted == "zero3"):
            raise RunError(
                f"{path} was written {'under' if flat else 'by another layout than'} zero3, and strategy.parallel={wanted} cannot read "
                "it: ZeRO-3 cuts every parameter flat, all other layouts by rows. Resume without that change, on as many ranks as you "
                "like, or start a new run."
            )
    return decided
