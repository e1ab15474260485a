"""What `patch` did to a model, as plain data: stored with the run, printed at its start."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Fused:
    """`count` modules of one class that now run on `op` of `kernels.functional`."""

    module: str
    op: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """`count` modules of one class that run as before, and why; `example` is the name of the first."""

    module: str
    reason: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Frozen, plain data. `applied` is False when the layer was switched off or nothing matched."""

    applied: bool
    backend: str  # what `functional` will choose on the device of the weights: "triton" or "torch"
    fused: tuple[Fused, ...]
    skipped: tuple[Skipped, ...]
    loss: str
    attention: str
    sharding: str
    launch_table_hash: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "KernelReport":
        parts = {
            "fused": tuple(Fused(**f) for f in data["fused"]),
            "skipped": tuple(Skipped(**s) for s in data["skipped"]),
        }
        return cls(**{**data, **parts})

    def summary(self) -> str:
        """One line for the screen; `text` and the run record hold the rest."""
        if not self.applied:
            return self.text()
        ops = sorted({op for fused in self.fused for op in fused.op.replace("(", " ").replace(")", " ").split()})
        left = sum(skipped.count for skipped in self.skipped)
        return f"kernel layer ({self.backend}): {', '.join(ops)}; {left} modules not taken (run.json says why)"

    def text(self) -> str:
        """One paragraph."""
        if not self.applied:
            return f"Kernel layer: not applied. {_listed(self.skipped)}".strip()
        fused = ", ".join(f"{f.count} {f.module} on {f.op}" for f in self.fused)
        return (
            f"Kernel layer ({self.backend}, launch table {self.launch_table_hash}): {fused}. Loss: {self.loss}. "
            f"Attention: {self.attention}. Sharding: {self.sharding}. {_listed(self.skipped)}"
        ).strip()


def _listed(skipped: Iterable[Skipped]) -> str:
    parts = [f"{s.count} {s.module} as before ({s.reason}; first: {s.example})" for s in skipped]
    return "Not taken: " + "; ".join(parts) + "." if parts else ""
