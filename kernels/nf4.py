"""NF4 weights: the bundle of plain tensors that the ops take, and dequantization bit-exact to bitsandbytes.

Layout (bitsandbytes): element 2i sits in the high nibble of byte i and 2i+1 in the low one, flat over the row-major
weight; one absmax per `blocksize` elements. With double quantization absmax is uint8 and stands for code2[absmax] *
absmax2 + offset, with one absmax2 per `blocksize2` absmaxes. Then, all in fp32 and rounded once at the end,

    value = code[nibble] * absmax                              code: the 16 levels, taken from the checkpoint

The product and the sum of the double quantization are rounded separately (no fused multiply-add), as bitsandbytes does.
Bytes per element: 0.5 packed + 1/64 absmax + itemsize written; 2.52 for a 16-bit result. Quantization stays
bitsandbytes'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch

# Packed bytes handled at a time by the torch path: bounds its index tensor to 8 MiB (measured flat from 2^18 to 2^22 on
# a CPU).
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NF4Weight:
    """A quantized weight as plain local tensors. Plain quantization has code2, absmax2 and offset None."""

    packed: Tensor  # uint8 [numel / 2] or [numel / 2, 1]
    absmax: Tensor  # fp32 [blocks], or uint8 [blocks] with double quantization
    code: Tensor  # fp32 [16]
    shape: tuple[int, ...]  # of the weight, (out, in) for a linear layer
    dtype: torch.dtype  # of the dequantized weight
    blocksize: int = 64
    code2: Tensor | None = None  # fp32 [256]
    absmax2: Tensor | None = None  # fp32 [ceil(blocks / blocksize2)]
    offset: Tensor | None = None  # fp32, one element
    blocksize2: int = 256

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, quant_state: Any) -> "NF4Weight":
        """From the data and the QuantState of a bitsandbytes Params4bit. Raises ValueError for any type but nf4."""
        if quant_state.quant_type != "nf4":
            raise ValueError(f"the weight is quantized as {quant_state.quant_type!r}; only nf4 has a kernel")
        inner = quant_state.state2 if quant_state.nested else None
        return cls(
            packed=packed.detach(),
            absmax=quant_state.absmax,
            code=quant_state.code,
            shape=tuple(quant_state.shape),
            dtype=quant_state.dtype,
            blocksize=quant_state.blocksize,
            code2=inner.code if inner else None,
            absmax2=inner.absmax if inner else None,
            offset=quant_state.offset.reshape(()) if inner else None,
            blocksize2=inner.blocksize if inner else 256,
        )

    def tensors(self) -> list[Tensor]:
        """packed, absmax, code and, with double quantization, code2, absmax2, offset."""
        return [self.packed, self.absmax, self.code] + [
            t for t in (self.code2, self.absmax2, self.offset) if t is not None
        ]


def dequantize_torch(
    packed: Tensor, absmax: Tensor, code: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
    shape: Sequence[int], dtype: torch.dtype, blocksize: int, blocksize2: int,
) -> Tensor:  # fmt: skip
    """Torch: look up both nibbles of a byte at once in a table of 256 pairs, scale, round."""
    numel = torch.Size(shape).numel()
    out = packed.new_empty(numel, dtype=dtype)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], dim=1)
    scale = absmax
    if absmax2 is not None:
        assert code2 is not None and offset is not None
        scale = code2[absmax.int()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)]
        scale = scale + offset
    flat = packed.reshape(-1)
    step = max(_CHUNK - _CHUNK % blocksize, blocksize)
    for start in range(0, len(flat), step):
        values = pairs.index_select(0, flat[start : start + step].int()).view(-1)
        first = 2 * start // blocksize
        whole = len(values) - len(values) % blocksize
        values[:whole].view(-1, blocksize).mul_(scale[first : first + whole // blocksize, None])
        values[whole:].mul_(scale[-1])
        target = out[2 * start : 2 * start + len(values)]
        target.copy_(values[: len(target)])
    return out.view(*shape)


@torch.library.custom_op("trebuchet::nf4_dequantize", mutates_args=())
def nf4_dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
    shape: Sequence[int], dtype: torch.dtype, blocksize: int, blocksize2: int, backend: str,
) -> Tensor:  # fmt: skip
    """The weight [shape] in `dtype`. No gradient: a quantized weight is frozen."""
    dispatch.count("nf4_dequantize", backend)
    if backend == "triton":
        from .triton_kernels import nf4 as kernels

        return kernels.dequantize(packed, absmax, code, code2, absmax2, offset, shape, dtype, blocksize, blocksize2)
    return dequantize_torch(packed, absmax, code, code2, absmax2, offset, shape, dtype, blocksize, blocksize2)


@nf4_dequantize.register_fake
def _(packed, absmax, code, code2, absmax2, offset, shape, dtype, blocksize, blocksize2, backend):
    return packed.new_empty(shape, dtype=dtype)
