"""The launch settings of every kernel: data and the few rules that read it. No tuning at run time, nothing measured
here.

Blocks, warps and chunk sizes decide the order in which numbers are added, so all ranks of a run must use the same ones:
`functional.launch_table_hash()` is compared at start. Change a number only together with tests/kernels (registers,
spills, shared memory per chip) and say which figure moved.
"""

import hashlib
import json

# Elements a row is padded to -> warps. 16 elements a thread at most up to 8,192 columns, so that a row stays in
# registers.
ROW_WARPS = {512: 1, 1024: 2, 2048: 4, 4096: 8, 8192: 16, 32768: 32}

TABLE: dict[str, dict[str, int]] = {
    # "registers" bounds what the compiler may use of them, in 16 bits and on NVIDIA chips, for blocks of one row. ptxas takes
    # what it is allowed, so a bound stands where nothing spills: 32 leave an SM full of threads.
    # Narrower rows are taken several per program: a tile of this many elements.
    "rms_norm_forward": {"tile": 2048, "registers": 32},
    # The backward pass loops over rows; `programs_dw` bounds the partial sums of dw (two per SM of a 132-SM chip). With dw
    # the compiler would hold a second row ahead; with 80 registers it does not, and an SM has room for three programs of
    # 4,096 columns instead of two, so that all 264 run at once on 108 SMs too. Wider rows gain no program by it.
    "rms_norm_backward": {
        "tile": 2048,
        "programs": 1056,
        "programs_dw": 264,
        "registers": 63,
        "registers_dw": 80,
        "registers_dw_wide": 95,
    },
    "layer_norm_forward": {"tile": 2048},
    "layer_norm_backward": {"tile": 2048, "programs": 1056, "programs_dw": 264},
    # Rows wider than norms.MAX_WIDTH: columns of a block, and shares of the rows for dw.
    "wide_norm": {"block": 4096, "warps": 8, "shares": 64},
    # Pairs of channels and elements of a half-head tile: 8 a thread, and more threads than pairs.
    "rope": {"block": 32, "elements": 512, "warps": 2},
    # The bounds are SwiGLU's; the backward pass's on contiguous tensors and without h.
    "glu_forward": {"block": 1024, "warps": 4, "registers": 30},
    "glu_backward": {"block": 1024, "warps": 4, "registers": 32},
    # 128-bit loads of a row that a thread has in flight.
    "loss_stats": {"parts": 4, "warps": 8},
    "loss_gradient": {"block": 8192, "warps": 8},
    "nf4_dequantize": {"block": 2048, "warps": 4},
    "adamw8bit": {"rows": 4, "warps": 4},
    # Tokens whose logits are alive at once. W is read twice per chunk: the products hide that from the chip's FLOP/byte
    # ridge on (T4 203, A100 153, H100 295 for 16 bits), twice that and more when dW accumulates too. A CPU is past its
    # ridge at 512.
    "token_chunk": {"cuda_frozen": 512, "cuda_trained": 2048, "other_frozen": 512, "other_trained": 1024},
}


def token_chunk(device_type: str, *, trained: bool) -> int:
    """Tokens per chunk of token_loss: a function of the kind of device and of whether the head trains, never of free
    memory."""
    place = "cuda" if device_type == "cuda" else "other"
    return TABLE["token_chunk"][f"{place}_{'trained' if trained else 'frozen'}"]


def launch_table_hash() -> str:
    """SHA-256 over every number above, 16 hex digits."""
    text = json.dumps([ROW_WARPS, TABLE], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
