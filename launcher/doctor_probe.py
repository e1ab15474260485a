"""Run by `trebuchet doctor` as a program of its own: imports torch, Triton and bitsandbytes, lets each compute once,
and prints what it found as one line of JSON. A crash in here is a finding, not the end of the report.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any


def main() -> None:
    facts: dict[str, Any] = {"torch": _torch()}
    if not facts["torch"].get("error"):
        for name, check in (("triton", _triton), ("bitsandbytes", _bitsandbytes)):
            if find_spec(name):
                try:
                    facts[name] = {"line": check()}
                except Exception as error:  # whatever a broken native library raises
                    facts[name] = {"error": _short(error)}
    print(json.dumps(facts))


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        return {"error": _short(error)}
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
        "threads": torch.get_num_threads(),
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }
    try:
        for index in range(facts["devices"]):
            ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
            if (ones @ ones).sum().item() != 64**3:
                facts["gpu_error"] = f"GPU {index} multiplies wrongly"
    except Exception as error:
        facts["gpu_error"] = _short(error)
    return facts


def _triton() -> str:
    import triton

    targets = sorted(triton.backends.backends)
    return f"{triton.__version__}, backends {', '.join(targets)}"


def _bitsandbytes() -> str:
    """Quantizes one matrix to NF4 and back, on the GPU where there is one."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    worst = (dequantize_4bit(packed, state) - weight).abs().max().item()
    # half of the widest gap of the NF4 code, 1 - 0.6962 lies below -1, times the block's absmax of at most 1
    if worst > 0.16:
        raise RuntimeError(f"NF4 loses {worst:.2f} of 1 on {device}")
    return f"{bitsandbytes.__version__}, NF4 computes on {device}"


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


if __name__ == "__main__":
    main()
