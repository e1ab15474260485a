"""Peak memory of a fine-tuning run, by arithmetic: per GPU for each phase, and per node on the host. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .memory_activations import Activations, activations
from .memory_request import MemoryRequest, ModelDims
from .memory_reserved import process, reserved
from .memory_states import States, states

__all__ = ["MemoryEstimate", "MemoryRequest", "ModelDims", "estimate"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one GPU (`host_bytes`: of one node). `phases` holds the allocated peak of load, forward_backward,
    optimizer_step and checkpoint_save; `components` the parts of `process_bytes` at the highest of them."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    process_bytes: int
    host_bytes: int
    phases: dict[str, int]
    components: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The object that `estimate --json` prints, in GiB."""

        def gib(value: int) -> float:
            return round(value / GIB, 4)

        return {
            "peak_allocated_gib": gib(self.peak_allocated_bytes),
            "peak_reserved_gib": gib(self.peak_reserved_bytes),
            "process_gib": gib(self.process_bytes),
            "host_gib": gib(self.host_bytes),
            "phases": {name: gib(value) for name, value in self.phases.items()},
            "components": {name: gib(value) for name, value in self.components.items()},
        }


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """Peak memory of one GPU and of one node for `request`."""
    s, a = states(request), activations(request)
    moments = _moments(request, s, a)
    phases: dict[str, int] = {}
    for (phase, _), parts in moments.items():
        phases[phase] = max(phases.get(phase, 0), sum(parts.values()))
    peak_parts = max(moments.values(), key=lambda parts: sum(parts.values()))
    peak = max(phases.values())
    held, needed = reserved(request, peak), process(request, peak)
    return MemoryEstimate(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=held,
        process_bytes=needed,
        host_bytes=0,
        phases=phases,
        components={**peak_parts, "allocator_and_context": needed - peak},
    )


def _moments(r: MemoryRequest, s: States, a: Activations) -> dict[tuple[str, str], dict[str, int]]:
    """Live bytes by component at each moment that can be the peak, keyed by (phase, moment)."""
    resident = {"weights": s.weights, "adapters": s.adapters, "optimizer": s.optimizer, "buffers": s.buffers}
    gathered = s.root + s.block
    kept_gradients = s.gradients if r.grad_accum > 1 or r.parallel in ("zero2", "zero3") else 0
    step = {**resident, "gradients": s.gradients, "step_temporary": s.step_temporary}
    return {
        ("load", "weights in place"): {
            "weights": s.weights,
            "adapters": s.adapters,
            "buffers": s.buffers,
            "gathered": 0,
        },
        ("forward_backward", "loss"): {
            **resident,
            "gradients": kept_gradients,
            "gathered": s.root,
            "activations": a.kept,
            "logits": a.loss,
        },
        ("forward_backward", "last block"): {
            **resident,
            "gradients": kept_gradients + s.head_gradient + s.block_gradient,
            "gathered": gathered,
            "activations": a.kept + a.working,
            "logits": a.held_logits,
        },
        ("forward_backward", "first block"): {
            **resident,
            "gradients": s.gradients,
            "gathered": gathered,
            "activations": (a.kept + a.retained if a.retained else a.kept_last) + a.working,
            "logits": a.held_logits,
        },
        ("optimizer_step", "step"): step,
        ("checkpoint_save", "gathered"): {**resident, "gathered": gathered},
    }
