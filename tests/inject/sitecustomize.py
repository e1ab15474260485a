"""Faults in processes that tests start, and nowhere else: on PYTHONPATH there, never installed, unknown to the package.

TREBUCHET_TEST_OOM=RANK:ROWS[:cuda]    on RANK, a forward pass of more than ROWS rows asks the allocator for more than there is:
                                       torch's own refusal on a CPU, or with `cuda` the error that the CUDA allocator raises
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from typing import Any

TARGET = "trebuchet.training.step"


def out_of_memory(kind: str) -> None:
    import torch

    if kind == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected by a test)")
    torch.empty(2**60, dtype=torch.uint8)


def sabotage(module: Any) -> None:
    rank, rows, *kind = os.environ["TREBUCHET_TEST_OOM"].split(":")
    inside = module.Stepper.loss

    def loss(self: Any, batch: Any) -> Any:
        if self.runtime.rank == int(rank) and len(batch["input_ids"]) > int(rows) and self.model.training:
            out_of_memory(kind[0] if kind else "cpu")
        return inside(self, batch)

    module.Stepper.loss = loss


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sabotage(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "TREBUCHET_TEST_OOM" in os.environ:
    sys.meta_path.insert(0, Finder())
