"""Log-probabilities of the model as it was before training, for dpo and kto: three ways to have them.

    AdaptersOff    the same base with its adapters switched off: nothing more in memory, one more forward pass a step
    Precomputed    computed once before the first step, for every training and held-out unit, and cached by content:
                   nothing more in memory or time per step, and what full fine-tuning takes unless told otherwise
    Copy           a second whole model, frozen, on every rank: only where asked for

A reference runs without gradients and without dropout. The cache's key holds what decides the numbers: the data as they
are batched, the base's files, the precision and the kernel layer; a resumed run finds it there, and one whose cache was
lost computes it again before its checkpoint is loaded, from the same base.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import load
from .data import JudgedSet, PairSet, Units
from .data.intake import digest
from .data.tables import file_digest
from .evaluate import evaluating
from .objectives import Objective
from .objectives.base import Batch, moved, per_document, token_logps
from .scores import Subject, of_stepper
from .step import Stepper

if TYPE_CHECKING:
    from .session import Session


class AdaptersOff:
    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        inside: Any = getattr(model, "module", model)
        with inside.disable_adapter():
            return _logps(model, batch, kernels=kernels)


class Copy:
    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        return _logps(self.model, batch, kernels=kernels)


class Precomputed:
    def __call__(self, model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
        found: Tensor = batch["reference"]
        return found


def _logps(model: nn.Module, batch: Batch, *, kernels: bool) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return per_document(token_logps(model, batch, kernels=kernels), batch)


def precompute(session: Session, stepper: Stepper) -> tuple[Units, Units | None]:
    """Training and held-out units with the log-probabilities of all their documents under the model as it now is.

    Collective: rank r computes every world-th batch, rank 0 writes, all read.
    """
    config, data = session.config, session.data
    cache = load.cache_folder() / "reference"
    base = [file_digest(path, cache.parent / "files") for path in sorted(session.base.glob("*.safetensors"))]
    micro = session.chosen.micro_batch
    layout: dict[str, Any] = {"packing": config.data.packing, "pad_id": session.pad_id, "micro_batch": micro}
    key = digest(
        "reference 1", data.fingerprint, base, session.chosen.precision, session.chosen.method, config.strategy.kernels,
        config.data.packing, config.strategy.quant.model_dump(),
    )  # fmt: skip
    out: list[Units | None] = []
    for name, units, rows in (("train", data.train, data.train_rows), ("eval", data.eval, data.eval_rows)):
        if units is None or len(units) == 0:
            out.append(units)
            continue
        assert isinstance(units, PairSet | JudgedSet)
        began = time.monotonic()
        file = cache / f"{key}-{name}.npy"
        missing = stepper.runtime.total(float(not file.exists()))[0] > 0  # a cache that only some nodes see
        asked = of_stepper(stepper), stepper.objective
        values = compute(units, *asked, rows, **layout) if missing else np.load(file)
        if missing and stepper.runtime.main:
            _write(file, values)
        how = f"computed in {time.monotonic() - began:.0f} s" if missing else "read from the cache"
        session.say(f"log-probabilities of the untrained model, {name}: {how}")
        out.append(replace(units, reference=values))
    train, held = out
    assert train is not None
    return train, held


def compute(
    units: PairSet | JudgedSet,
    subject: Subject,
    objective: Objective,
    rows: Sequence[Sequence[int]],
    *,
    packing: bool,
    pad_id: int,
    micro_batch: int,
) -> np.ndarray:
    """float32 [N, 2] of the units of `rows`, the others 0; the same on every rank."""
    values = torch.zeros(len(units), 2, dtype=torch.float64)
    for start in range(0, len(rows), micro_batch * subject.world):  # every rank makes the same number of passes
        first = start + subject.rank * micro_batch
        mine = rows[first : min(first + micro_batch, len(rows))]
        batch = objective.collate(units, mine, packing=packing, pad_id=pad_id, width=None)
        subject.came_on()
        flat = [i for row in mine for i in row]
        found = [
            _forward(subject, part) for part in ([batch, batch["mismatched"]] if "mismatched" in batch else [batch])
        ]
        both = torch.stack(found, dim=1) if len(found) == 2 else found[0].view(-1, 2)
        if flat:
            values[flat] = both.double().cpu()
    if subject.world > 1:
        values = values.to(subject.device)
        torch.distributed.all_reduce(values)
    return values.cpu().to(torch.float32).numpy()


def _forward(subject: Subject, batch: Batch) -> Tensor:
    with subject.autocasting():
        return _logps(subject.model, moved(batch, subject.device), kernels=subject.kernels)


def _write(file: Path, values: np.ndarray) -> None:
    """Beside, synced, renamed: two runs that compute the same write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("wb") as out:
            np.save(out, values)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
