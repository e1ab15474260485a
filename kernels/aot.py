"""Compile every kernel for every chip without a GPU, and hold registers, spills and shared memory to budgets.json.

    python -m trebuchet.kernels.aot               compile, print the table, compare with the budgets (exit 1 beyond one)
    python -m trebuchet.kernels.aot --write       make what was measured the new budgets
    python -m trebuchet.kernels.aot --json FILE   the measurements, for tests and benchmarks

Kernels go through Triton's own JIT with a driver that only names a target, so specialization (16-byte alignment,
strides of 1) is what a run on that chip would see. Measured on the machine code (cuobjdump comes with the
Triton wheel), widths of loads on the PTX; for ROCm on the assembly and its metadata. Leaves out everything that needs to run.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).with_name("budgets.json")
# Shared memory a block may use, KiB (CUDA C Programming Guide, table of compute capabilities; LDS on CDNA 2 and 3).
SHARED_KIB = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "gfx90a": 64,
    "gfx942": 64,
}
TARGETS = tuple(SHARED_KIB)
_NOP = 0x918

Measured = dict[str, dict[str, Any]]  # case -> registers, stack_bytes, shared_bytes, instructions, load_bits, compile_s


class _Target:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.name = name
        number = name.removeprefix("sm_")
        self.target = GPUTarget("cuda", int(number), 32) if number != name else GPUTarget("hip", name, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.name  # the JIT keys its cache by device

    def get_current_stream(self, _device) -> int:
        return 0


def compile_launch(launch: Any, target: str) -> Any:
    """The compiled kernel (triton's CompiledKernel, not loaded) of one recorded launch for one target."""
    from triton.runtime.driver import driver

    driver.set_active(_Target(target))
    options = {k: v for k, v in launch.options.items() if k != "maxnreg" or target.startswith("sm_")}
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **options)


def measure(target: str, only: str = "") -> Measured:
    """Compile the cases whose name contains `only` for `target`: fp16 before sm_80, bf16 from there on."""
    import torch

    from .aot_cases import cases

    found: Measured = {}
    for name, launch in cases(torch.float16 if target == "sm_75" else torch.bfloat16).items():
        if only in name:
            start = time.perf_counter()
            kernel = compile_launch(launch, target)
            seconds = time.perf_counter() - start
            found[name] = inspect(kernel) | {"warps": launch.options["num_warps"], "compile_s": round(seconds, 3)}
    return found


def inspect(kernel: Any) -> dict[str, Any]:
    """Registers per thread, stack bytes (spills), shared bytes, instructions and the widths of global loads and
    stores."""
    if "cubin" in kernel.asm:
        return _inspect_cubin(kernel)
    return _inspect_amdgcn(kernel)


def _inspect_cubin(kernel: Any) -> dict[str, Any]:
    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared_bytes": kernel.metadata.shared,
        "instructions": _count_instructions(cubin),
        "load_bits": _widths(ptx, "ld"),
        "store_bits": _widths(ptx, "st"),
    }


def _count_instructions(cubin: bytes) -> int:
    """Instructions of the code sections except NOP: 16 bytes each since sm_70, the opcode in the lowest 12 bits.

    The same number as nvdisasm lists (a test compares), which takes half a second for each kernel.
    """
    sections, size, count, names_at = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HHH", cubin, 58))
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections + i * size) for i in range(count)]
    names = cubin[headers[names_at][4] :]
    found = 0
    for name, _, _, _, start, length, *_ in headers:
        if names[name : name + 6] == b".text.":
            words = struct.unpack_from(f"<{length // 8}Q", cubin, start)[::2]
            found += sum(word & 0xFFF != _NOP for word in words)
    return found


def _widths(ptx: str, kind: str) -> dict[str, int]:
    """{bits: how many instructions} of global loads ("ld") or stores ("st") in PTX, widest first."""
    found: dict[str, int] = {}
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.[A-Za-z_0-9:]+)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx):
        width = str(int(vector or 1) * int(bits))
        found[width] = found.get(width, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def _inspect_amdgcn(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # type: ignore[index]

    body = re.findall(r"^\s+((?:[sv]|global|flat|buffer|ds|scratch)_[a-z0-9_]+)", text, re.MULTILINE)
    widths = {
        "dwordx4": "128",
        "dwordx3": "96",
        "dwordx2": "64",
        "dword": "32",
        "ushort": "16",
        "short": "16",
        "ubyte": "8",
    }
    loads: dict[str, int] = {}
    for code in body:
        access = re.match(r"(?:global|buffer|flat)_load_(dwordx[234]|dword|ushort|short|ubyte)", code)
        if access:
            bits = widths[access[1]]
            loads[bits] = loads.get(bits, 0) + 1
    return {
        "registers": value("vgpr_count"),
        "stack_bytes": value("private_segment_fixed_size") + 4 * value("vgpr_spill_count"),
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(body),
        "load_bits": dict(sorted(loads.items(), key=lambda item: -int(item[0]))),
        "store_bits": {},
    }


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def beyond(measured: dict[str, Measured], budgets: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """One sentence for each figure over its budget, each spill, each case without a budget."""
    found = []
    for target, kernels in measured.items():
        for case, got in kernels.items():
            budget = budgets.get(case, {}).get(target)
            if budget is None:
                found.append(f"{case} on {target}: no budget; run python -m trebuchet.kernels.aot --write")
                continue
            if got["stack_bytes"]:
                found.append(f"{case} on {target}: spills {got['stack_bytes']} bytes of stack")
            if got["shared_bytes"] > SHARED_KIB[target] * 1024:
                found.append(f"{case} on {target}: {got['shared_bytes']} bytes of shared memory do not fit the chip")
            for key in ("registers", "shared_bytes", "instructions"):
                if got[key] > budget[key]:
                    found.append(f"{case} on {target}: {key} {got[key]}, budget {budget[key]}")
            if budget["load_bits"] > int(next(iter(got["load_bits"]), 0)):
                found.append(f"{case} on {target}: widest load {got['load_bits']}, budget {budget['load_bits']} bits")
    return found


def as_budgets(measured: dict[str, Measured]) -> dict[str, dict[str, dict[str, int]]]:
    """Measurements in the form of budgets.json: case -> target -> figures."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for target, kernels in measured.items():
        for case, got in kernels.items():
            figures = {key: got[key] for key in ("registers", "shared_bytes", "instructions")}
            figures["load_bits"] = int(next(iter(got["load_bits"]), 0))
            found.setdefault(case, {})[target] = figures
    return found


def table(measured: dict[str, Measured]) -> str:
    """Registers / shared bytes / instructions per case, one column a target."""
    names = list(measured)
    rows = [f"{'registers/shared/instructions':52}" + "".join(f"{n:>16}" for n in names)]
    for case in next(iter(measured.values())):
        cells = (measured[n][case] for n in names)
        texts = (f"{c['registers']}/{c['shared_bytes']}/{c['instructions']}" for c in cells)
        rows.append(f"{case:52}" + "".join(f"{t:>16}" for t in texts))
    return "\n".join(rows)


def measure_all(targets: Iterable[str], workers: int, only: str = "") -> dict[str, Measured]:
    """`measure` for each target, in `workers` processes of their own (Triton's driver is global to a process)."""
    targets = list(targets)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(targets, pool.map(measure, targets, [only] * len(targets)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trebuchet.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write budgets.json from what was measured")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before any worker imports triton
    measured = measure_all(args.targets, args.workers, args.only)
    print(table(measured))
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))
    if args.write:
        BUDGETS.write_text(json.dumps(as_budgets(measured), indent=1) + "\n")
    complaints = beyond(measured, json.loads(BUDGETS.read_text()))
    print("\n".join(complaints) or f"all {len(next(iter(measured.values())))} cases on {len(measured)} chips in budget")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
