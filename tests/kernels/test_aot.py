"""Every kernel compiled for every chip at production sizes, held to kernels/budgets.json. No GPU, no interpreter."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trebuchet.kernels import aot

Measurements = dict[str, aot.Measured]
pytestmark = pytest.mark.xdist_group("aot")  # one compilation for all of them


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurements:
    """Compiled afresh in processes of their own: this one's kernels are bound to the interpreter."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = os.environ["AOT_TEST_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "trebuchet.kernels.aot", "--json", str(folder / "measured.json")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert (folder / "measured.json").exists(), done.stderr
    return json.loads((folder / "measured.json").read_text())


def budgets() -> dict:
    return json.loads(Path(aot.BUDGETS).read_text())


@pytest.mark.slow
def test_within_budget(measured: Measurements) -> None:
    """Registers, shared memory, instructions and widest load of each case; no stack anywhere."""
    assert set(measured) == set(aot.TARGETS)
    assert aot.beyond(measured, budgets()) == []
    assert all(set(kernels) == set(budgets()) for kernels in measured.values()), "a budget without a kernel"


@pytest.mark.slow
def test_what_the_budget_must_say(measured: Measurements) -> None:
    """The budget itself: no spill, shared memory within the chip, 128-bit loads and stores where rows are aligned.

    Waves of 64 lanes share the same blocks on ROCm, so a thread has half as much to load there: 64 bits at least.
    """
    narrow = {"rope q9 k3"}  # 3 heads of 32 halves are fewer elements than one warp's 128-bit loads
    for target, kernels in measured.items():
        for case, got in kernels.items():
            assert got["stack_bytes"] == 0, (case, target)
            assert got["shared_bytes"] <= aot.SHARED_KIB[target] * 1024
            if not target.startswith("sm_"):
                assert int(next(iter(got["load_bits"]))) >= 64, (case, target, got["load_bits"])
            elif not any(case.startswith(n) for n in narrow):
                assert "128" in got["load_bits"], (case, target, got["load_bits"])
                assert "loss statistics" in case or "128" in got["store_bits"], (case, target, got["store_bits"])


@pytest.mark.slow
def test_instructions_are_counted_as_nvdisasm_does(measured: Measurements, tmp_path: Path) -> None:
    """Two cubins from the cache that the compilation left, listed by NVIDIA's own disassembler."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    cubins = sorted(Path(os.environ["AOT_TEST_CACHE"]).rglob("*.cubin"))[:2]
    assert len(cubins) == 2
    for cubin in cubins:
        listing = subprocess.run([tool, "-ndf", "-c", cubin], capture_output=True, text=True, check=True).stdout
        codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", listing, re.MULTILINE)
        assert aot._count_instructions(cubin.read_bytes()) == sum(code != "NOP" for code in codes) > 0


@pytest.mark.slow
def test_targets_of_norms_and_swiglu(measured: Measurements) -> None:
    """The figures set for RMSNorm: at most 32 registers forward and 63 backward; with dw 80, so that an SM has room for
    three programs of 4,096 columns (half the warps and two thirds of the instructions of what fits in 64), and 95
    wider. SwiGLU's backward pass leaves an SM full of threads: 32."""
    for target, kernels in measured.items():
        assert kernels["rms_norm forward H=4096"]["registers"] <= 32, target
        assert kernels["rms_norm backward H=4096 frozen"]["registers"] <= 63, target
        assert kernels["rms_norm backward H=4096 dw"]["registers"] <= 80, target
        assert kernels["rms_norm backward H=8192 dw"]["registers"] <= 95, target
        assert kernels["swiglu backward F=14336"]["registers"] <= 32, target


def test_a_figure_beyond_its_budget_is_named() -> None:
    got = {
        "registers": 40, "stack_bytes": 0, "shared_bytes": 32, "instructions": 100, "load_bits": {"128": 4, "32": 1},
    }  # fmt: skip
    measured = {"sm_80": {"case": got}}
    allowed = aot.as_budgets(measured)
    assert aot.beyond(measured, allowed) == []
    for key, value, words in (
        ("registers", 41, "registers 41, budget 40"), ("stack_bytes", 8, "spills 8 bytes"),
        ("shared_bytes", 200_000, "do not fit the chip"), ("instructions", 101, "instructions 101"),
        ("load_bits", {"64": 8}, "widest load"),
    ):  # fmt: skip
        worse = copy.deepcopy(measured)
        worse["sm_80"]["case"][key] = value
        assert any(words in sentence for sentence in aot.beyond(worse, allowed)), key
    assert "no budget" in aot.beyond({"sm_80": {"new": got}}, allowed)[0]
