"""LoRA and QLoRA in this process, from base model to the folder that users load, against PEFT and bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trebuchet.launcher import api, record, worker
from trebuchet.launcher.errors import RunError
from trebuchet.training.loop import Loop

Reference = Callable[..., torch.Tensor]


def quantized(model: torch.nn.Module) -> torch.nn.Module:
    """The linear layers of the blocks as bitsandbytes' NF4 with double quantization stores them, in float64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            packed, state = quantize_4bit(module.weight.data.float(), quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(packed, state).double()
    return model


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.slow
def test_adapters_train_like_peft_in_float64(
    make_loop: Callable[..., Loop],
    tiny_model: Path,
    rows_file: Path,
    by_template: Callable[[Path], Any],
    reference_loss: Reference,
    method: str,
) -> None:
    from peft import LoraConfig, get_peft_model

    rate, steps, samples = 1e-2, 3, by_template(rows_file)
    settings = {"strategy.method": method, "strategy.lora": {"r": 4, "alpha": 8}, "optimization.warmup": 0}
    loop = make_loop({**settings, "optimization.learning_rate": rate, "optimization.schedule": "constant"})
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    if method == "qlora":
        quantized(base)
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    started = {n: p for n, p in loop.stepper.model_inside().named_parameters() if p.requires_grad}
    wanted = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert started.keys() == wanted.keys() and all(p.dtype == torch.float32 for p in started.values())
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(started[name])
            parameter.data = parameter.data.double()
    optimizer = torch.optim.AdamW(wanted.values(), lr=rate, weight_decay=0.01)
    everything = [loop.batch(range(start, min(start + 4, len(loop.rows)))) for start in range(0, len(loop.rows), 4)]
    for _ in range(steps):
        ours = loop.stepper.step(everything)
        loss = reference_loss(peft, samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours.loss == pytest.approx(float(loss), rel=2e-5)  # fp32 against float64


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.slow
def test_a_whole_run_leaves_an_adapter_that_peft_opens(
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    tiny_model: Path,
    held_out_file: Path,
    by_template: Callable[[Path], Any],
    reference_loss: Reference,
    method: str,
) -> None:
    """The recorded held-out loss is that of the saved folder, opened the way users do."""
    from transformers import BitsAndBytesConfig

    changes = {"strategy.method": method, "strategy.lora": {"r": 8}, "optimization.learning_rate": 1e-2}
    folder, plan = api.begin(tiny_config({**changes, "optimization.max_steps": 20}, output=str(tmp_path / "run")))
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    found = record.read(folder)
    adapters = plan.model.lora_params(8)
    assert found["parameters"] == {"trainable": adapters, "total": plan.model.params + adapters}
    assert found["evaluation"]["after"]["loss"] < found["evaluation"]["before"]["loss"] - 0.2
    settings = json.loads((folder.model / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model) and settings["r"] == 8
    assert sorted(p.name for p in folder.model.glob("*.safetensors")) == ["adapter_model.safetensors"]

    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    opened = AutoModelForCausalLM.from_pretrained(folder.model, **options)
    with torch.no_grad():
        loss = float(reference_loss(opened, by_template(held_out_file)))
    assert loss == pytest.approx(found["evaluation"]["after"]["loss"], rel=1e-5)


def test_fp16_resumes_with_its_loss_scale(make_loop: Callable[..., Loop]) -> None:
    changes = {"model.dtype": "fp16", "strategy.method": "lora", "strategy.kernels": "off"}
    loop = make_loop(changes)
    assert loop.stepper.scaler is not None
    result = loop.stepper.step([loop.batch([0])])
    assert 0 < result.grad_norm < 100  # unscaled before it is clipped and reported
    loop.stepper.scaler.update(512.0)
    loop.save(1)
    again = make_loop(changes)
    again.runtime.folder = loop.runtime.folder
    assert again.resume() == 1
    assert again.stepper.scaler.get_scale() == loop.stepper.scaler.get_scale() == 512.0


def test_a_checkpoint_of_other_data_or_batch_is_bad_input(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()
    loop.save(1)
    other = make_loop({"optimization.global_batch_size": 8, "optimization.seed": 1})
    other.runtime.folder = loop.runtime.folder
    with pytest.raises(RunError, match=r"made with another .*global_batch_size, seed"):
        other.resume()


def test_kernels_on_and_off_train_the_same(make_loop: Callable[..., Loop]) -> None:
    losses = {}
    for kernels in ("on", "off"):
        loop = make_loop({"strategy.kernels": kernels, "optimization.learning_rate": 1e-2, "optimization.warmup": 0})
        losses[kernels] = [loop.stepper.step([loop.batch(loop.order.batch(s))]).loss for s in range(6)]
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-5)
    assert losses["on"][-1] < losses["on"][0] - 1
