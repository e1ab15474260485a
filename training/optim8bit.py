"""AdamW with 8-bit states over whole and sharded parameters: bitsandbytes' step, or the kernel layer's on the same states.

bitsandbytes steps plain tensors, and its op knows no DTensor. Here it is given each rank's own rows as a plain tensor, with the
states of those rows, so blocks of 256 begin anew on every rank: states of one world size cannot be cut for another. Which
parameters get 8-bit states is decided by the size of the whole parameter (4,096 elements, bitsandbytes' own limit), the same on
every rank. Left out: paging, which bitsandbytes has on CUDA only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch.distributed.tensor import DTensor

from ..kernels import functional

SMALL = 4096  # elements; smaller parameters keep fp32 states


class _OwnRows:
    """Hands an optimizer of bitsandbytes the rows of this rank in place of a DTensor."""

    state: defaultdict[torch.Tensor, Any]

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        with self._rows(p) as own:
            super().init_state(group, own, gindex, pindex)  # type: ignore[misc]

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        with self._rows(p) as own:
            if own.numel() > 0:  # fewer rows than ranks
                self.step_rows(group, own, gindex, pindex)

    def step_rows(self, group: dict[str, Any], own: torch.Tensor, gindex: int, pindex: int) -> None:
        super().update_step(group, own, gindex, pindex)  # type: ignore[misc]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return config | {"min_8bit_size": 0 if group["params"][pindex].numel() >= SMALL else 2**62}

    @contextmanager
    def _rows(self, p: torch.Tensor) -> Iterator[torch.Tensor]:
        if not isinstance(p, DTensor):
            yield p
            return
        own = p.to_local().detach()
        own.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
        self.state[own] = self.state[p]
        try:
            yield own
        finally:
            self.state[p] = self.state.pop(own)


class AdamW8bit(_OwnRows, bnb.optim.AdamW8bit):
    """bitsandbytes' own step."""


class PagedAdamW8bit(_OwnRows, bnb.optim.PagedAdamW8bit):
    """bitsandbytes' own step, its states in memory that CUDA pages out."""


class KernelAdamW8bit(_OwnRows, bnb.optim.AdamW8bit):
    """The kernel layer's step on bitsandbytes' states (kernels/adamw8bit.py); parameters with fp32 states are bitsandbytes'."""

    def step_rows(self, group: dict[str, Any], own: torch.Tensor, gindex: int, pindex: int) -> None:
        state, config = self.state[own], self.get_config(gindex, pindex, group)
        if state["state1"].dtype != torch.uint8:
            super().step_rows(group, own, gindex, pindex)
            return
        assert own.grad is not None
        state["step"] += 1
        functional.adamw8bit_step(
            own, own.grad, state["state1"], state["state2"], state["absmax1"], state["absmax2"], state["qmap1"],
            state["qmap2"], lr=config["lr"], beta1=config["betas"][0], beta2=config["betas"][1], eps=config["eps"],
            weight_decay=config["weight_decay"], step=state["step"],
        )  # fmt: skip
