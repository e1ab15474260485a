"""The GPU benchmark, walked through on a CPU: every op is checked against fp64 there too, and a wrong one is not timed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from trebuchet.kernels import functional as K

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels_gpu.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("kernels_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def test_dry_run(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = benchmark.main(["--dry-run", "--json", str(tmp_path / "out.json")])
    everything = {
        "rms_norm", "add_rms_norm", "layer_norm", "swiglu", "geglu", "rope", "cross_entropy", "token_loss frozen",
        "nf4_dequantize", "lora_linear", "lora_linear NF4", "lora_qkv", "lora_mlp", "adamw8bit_step",
    }  # fmt: skip
    assert {r.op for r in results} == everything | {"training step, 1 layers"}
    assert {r.implementation for r in results if "nf4" in r.op} == {"ours", "eager", "bitsandbytes"}
    assert all(r.note == "" for r in results), [r for r in results if r.note]
    assert all(r.milliseconds is None and r.gb_per_s is None for r in results), "a dry run measures nothing"
    assert json.loads((tmp_path / "out.json").read_text())["machine"]["launch_table"] == K.launch_table_hash()
    assert "no times" in capsys.readouterr().out


def test_a_wrong_op_is_reported_and_not_timed(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    right = K.swiglu
    monkeypatch.setattr(K, "swiglu", lambda e, g: right(e, g) * 1.05)
    (result,) = benchmark.main(["--dry-run", "--only", "swiglu"])
    assert result.note.startswith("WRONG") and result.milliseconds is None


def test_a_step_with_wrong_gradients_is_reported(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.time_step

    def wrong(patched: bool, *rest: object) -> tuple[float | None, str, torch.Tensor]:
        ms, note, gradients = right(patched, *rest)
        assert gradients.norm() > 0
        return ms, note, gradients * 1.2 if patched else gradients

    monkeypatch.setattr(benchmark, "time_step", wrong)
    eager, ours = benchmark.main(["--dry-run", "--only", "training step"])
    assert eager.note == "" and ours.note.startswith("WRONG: the adapters' gradients differ by ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "--dry-run" in capsys.readouterr().err
