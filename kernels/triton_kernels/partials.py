"""Partial sums of a weight gradient: each program keeps its own in registers and writes one row; torch adds the rows in a
fixed order, so that nothing is atomic. Leaves out the kernels that form them (`rms_norm`, `layer_norm`)."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def store_partial(ptr, sums, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """Write the H sums of [ROWS, BLOCK] fp32 to ptr.

    A thread of one row of 16-bit loads holds 8 neighbouring columns, and stores 4 fp32 at a time. In order, the halves
    would have to be exchanged through BLOCK * 4 bytes of shared memory; so all first halves are written, then all
    second ones, and `sum_partials` puts the total in order.
    """
    if ROWS == 1 and HALVES and H % 8 == 0:
        halves = tl.permute(tl.reshape(sums, [BLOCK // 8, 2, 4]), (1, 0, 2))
        eighth = tl.arange(0, BLOCK // 8)[None, :, None]
        at = tl.arange(0, 2)[:, None, None] * (H // 2) + eighth * 4 + tl.arange(0, 4)[None, None, :]
        tl.store(ptr + at, halves, mask=eighth < H // 8)
    elif ROWS == 1:
        # No reduction: `tl.sum` over one row would still stage [1, BLOCK] through shared memory.
        col = tl.arange(0, BLOCK)[None, :]
        tl.store(ptr + col, sums, mask=col < H)
    else:
        col = tl.arange(0, BLOCK)
        tl.store(ptr + col, tl.sum(sums, axis=0), mask=col < H)


def sum_partials(partial: Tensor, x: Tensor, rows: int) -> Tensor:
    """[H] fp32 from what `store_partial` wrote, [programs, H], for inputs like x in blocks of `rows` rows."""
    total, width = partial.sum(0), partial.shape[1]
    if rows == 1 and x.element_size() == 2 and width % 8 == 0:
        total = total.view(2, width // 8, 4).transpose(0, 1).reshape(width)
    return total


def split_rows(total: int, rows: int, programs: int) -> tuple[int, int]:
    """(rows of one program, programs): at most `programs`, whole blocks of `rows` each."""
    share = triton.cdiv(triton.cdiv(total, rows), programs) * rows
    return share, triton.cdiv(total, share) if total else 0
