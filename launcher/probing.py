"""`plan --probe`: the planned step run on fake tensors (training/fake_step.py) beside what the formula says of it.

Left out: what the fake world has none of, the caching allocator, CUDA's context and workspaces; those are the formula's word alone.
"""

from __future__ import annotations

from typing import Any

from ..strategies.memory import estimate
from ..strategies.memory_constants import CONSTANTS
from .api import can_read_data
from .costing import Layout, request
from .errors import UserError
from .plan import GIB, Plan
from .planner import hardware_of


def probe(plan: Plan) -> dict[str, Any]:
    """{"phases": {name: {"probe_gib", "formula_gib"}}, "difference", "layers", "measured_at", "seconds"}. Loads torch; at most a
    minute on a quiet core.

    The difference is that of the peaks, (formula - probe) / probe, without the workspaces, which no torch operator makes. Raises
    UserError for what cannot be run so (ZeRO-3), or when torch and transformers are not installed.
    """
    if not can_read_data():
        raise UserError(
            "--probe runs the model's code and needs torch and transformers: pip install 'trebuchet[train]'"
        )
    from ..training.fake_step import fake_step

    found, formula = fake_step(plan), expected(plan)
    phases = {
        name: {"probe_gib": round(live / GIB, 3), "formula_gib": round(formula[name] / GIB, 3)}
        for name, live in found.phases.items()
    }
    peak = max(formula[name] for name in found.phases)
    return {
        "phases": phases,
        "difference": round(peak / found.peak_bytes - 1, 4),
        "layers": plan.model.num_layers,
        "measured_at": list(found.measured_at),  # depths that were run: all layers, or three small numbers of them
        "seconds": round(found.seconds, 1),
    }


def expected(plan: Plan) -> dict[str, int]:
    """The formula's bytes by phase for the chosen strategy, without workspaces."""
    chosen = plan.chosen
    assert chosen is not None
    hardware = hardware_of(plan.config, plan.cluster)
    layout = Layout(chosen.parallel, chosen.offload, chosen.dp_replicate, chosen.dp_shard)
    asked = request(plan.config, plan.model, hardware, chosen.method, layout, chosen.checkpointing, chosen.micro_batch)
    return {name: live - int(CONSTANTS["workspace_bytes"]) for name, live in estimate(asked).phases.items()}
