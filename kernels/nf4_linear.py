"""A frozen linear layer in NF4 whose every tensor is ordinary state in bytes, so that sharding cannot hurt it.

bitsandbytes keeps a weight's scales beside the parameter, where FSDP2 neither shards nor saves them. Here all are uint8, which no
mixed-precision policy and no `.to(dtype)` touches; floats are views of bytes, taken in the forward:

    weight    parameter [blocks, 32]      two weights a byte, one row per block of 64; row-major over (out, in)
    absmax    parameter [blocks]          with double quantization; else [blocks, 4], the bytes of an fp32 each
    absmax2   buffer [4 x ceil(blocks / 256)]   bytes of fp32; with double quantization only, as are code2 and offset
    code2     buffer [1024], offset buffer [4]; code buffer [64]

Weight and absmax have one row per block, so a shard of rows cuts both at the same weights. The layout of the values is that of
`nf4.py`, bit for bit bitsandbytes'. Left out: quantizing (strategies/streaming.py), merging.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .functional import NF4Weight

BLOCK = 64  # weights with one absmax
BLOCK2 = 256  # absmaxes with one absmax2


class NF4Linear(nn.Linear):
    """x W^T + bias with W [out, in] in NF4. A subclass of nn.Linear so that PEFT adapts it as one; its weight is uint8.

    `dtype` is what W is dequantized to, `compute_dtype` that of the product. Raises ValueError when out x in is not a
    multiple of 64.
    """

    code: Tensor
    code2: Tensor
    absmax2: Tensor
    offset: Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, out_features: int, in_features: int, *, bias: Tensor | None, double: bool, dtype: torch.dtype,
        compute_dtype: torch.dtype, device: torch.device | str = "meta",
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        if (out_features * in_features) % BLOCK:
            raise ValueError(f"a weight of {out_features} x {in_features} does not divide into blocks of {BLOCK}")
        self.in_features, self.out_features = in_features, out_features
        self.nested, self.dtype, self.compute_dtype = double, dtype, compute_dtype
        blocks = out_features * in_features // BLOCK
        self.weight = self._frozen(blocks, BLOCK // 2, device=device)
        self.absmax = self._frozen(blocks, device=device) if double else self._frozen(blocks, 4, device=device)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        sizes = {"code": 64} | ({"code2": 1024, "absmax2": 4 * -(-blocks // BLOCK2), "offset": 4} if double else {})
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=device))

    @staticmethod
    def _frozen(*shape: int, device: torch.device | str) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)

    def nf4(self) -> NF4Weight:
        """The tensors as the ops take them: views. The weight must be whole and local, as it is inside a forward."""
        return NF4Weight(
            packed=self.weight,
            absmax=self.absmax if self.nested else floats(self.absmax),
            code=floats(self.code),
            shape=(self.out_features, self.in_features),
            dtype=self.dtype,
            blocksize=BLOCK,
            code2=floats(self.code2) if self.nested else None,
            absmax2=floats(self.absmax2) if self.nested else None,
            offset=floats(self.offset).reshape(()) if self.nested else None,
            blocksize2=BLOCK2,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.lora_linear(x.to(self.compute_dtype), self.nf4(), None, None, 0.0, self.bias)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, double={self.nested}"


def floats(raw: Tensor) -> Tensor:
    """uint8 [..., 4 n] as fp32, flat; shares memory."""
    return raw.detach().reshape(-1).view(torch.float32)


def raw(values: Tensor) -> Tensor:
    """fp32 [...] as uint8 [4 n], flat; shares memory where `values` is contiguous."""
    return values.detach().reshape(-1).view(torch.uint8)
