"""NF4: bit for bit what bitsandbytes' CPU implementation gives, both implementations, plain and double quantization."""

import bitsandbytes.functional as bnb
import pytest
import torch
from trebuchet.kernels import functional as K
from trebuchet.kernels.nf4 import NF4Weight

SHAPES = [(96, 128), (7, 130), (1, 65), (5, 3)]  # whole blocks; a partial last block; an odd number of elements


def quantize(
    shape: tuple[int, ...], dtype: torch.dtype, nested: bool, blocksize: int = 64
) -> tuple[NF4Weight, torch.Tensor]:
    torch.manual_seed(0)
    packed, state = bnb.quantize_4bit(
        torch.randn(shape).to(dtype), quant_type="nf4", compress_statistics=nested, blocksize=blocksize
    )
    return NF4Weight.from_bitsandbytes(packed, state), bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact(shape: tuple[int, ...], backend: str, dtype: torch.dtype, nested: bool) -> None:
    weight, expected = quantize(shape, dtype, nested)
    before = [t.clone() for t in weight.tensors()]
    with K.force_backend(backend):
        ours = K.nf4_dequantize(weight)
    assert len(before) == (6 if nested else 3)
    assert all(torch.equal(t, old) for t, old in zip(weight.tensors(), before, strict=True))
    if backend == "triton" and dtype == torch.bfloat16:
        # The interpreter truncates at the one cast; undo nothing, allow exactly that unit.
        exact = K.nf4_dequantize(weight, torch.float32)
        ours, expected = ours.float(), (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_block_sizes(blocksize: int, backend: str) -> None:
    weight, expected = quantize((64, 256), torch.float16, True, blocksize)
    with K.force_backend(backend):
        assert torch.equal(K.nf4_dequantize(weight), expected)


def test_many_blocks_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one absmax2, and more than one chunk of the torch path."""
    from trebuchet.kernels import nf4

    monkeypatch.setattr(nf4, "_CHUNK", 1000)
    weight, expected = quantize((300, 200), torch.float32, True)
    assert weight.absmax2 is not None and len(weight.absmax2) > 1
    assert torch.equal(K.nf4_dequantize(weight), expected)
    with K.force_backend("triton"):
        assert torch.equal(K.nf4_dequantize(weight), expected)


def test_a_changed_code_is_noticed() -> None:
    """The table of pairs is kept per code tensor; writing to the code must not leave the old one in use."""
    weight, _ = quantize((4, 64), torch.float32, False)
    with K.force_backend("triton"):
        before = K.nf4_dequantize(weight)
        weight.code.mul_(2.0)
        assert torch.equal(K.nf4_dequantize(weight), before * 2.0)


def test_other_types_are_refused() -> None:
    packed, state = bnb.quantize_4bit(torch.randn(64, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="fp4"):
        NF4Weight.from_bitsandbytes(packed, state)
