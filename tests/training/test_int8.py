"""LoRA on an LLM.int8 base (strategy.quant.type int8): against its dequantized weights in float64, and against bitsandbytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trebuchet.launcher import api, record, worker
from trebuchet.training.loop import Loop

INT8 = {"strategy.method": "qlora", "strategy.quant": {"type": "int8"}, "strategy.lora": {"r": 4, "alpha": 8}}


def dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """The linear layers of the blocks as LLM.int8 stores them (Dettmers et al. 2022): 127 levels of each row's largest weight."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            weight = module.weight.data
            scale = weight.half().abs().amax(1, keepdim=True).double()  # bitsandbytes quantizes from fp16
            module.weight.data = (weight.half().double() * 127 / scale).round() * scale / 127
    return model


@pytest.mark.slow
def test_adapters_train_like_peft_on_the_dequantized_weights(
    make_loop: Callable[..., Loop],
    tiny_model: Path,
    rows_file: Path,
    by_template: Callable[[Path], Any],
    reference_loss: Callable[..., torch.Tensor],
) -> None:
    from peft import LoraConfig, get_peft_model

    rate, samples = 1e-2, by_template(rows_file)
    loop = make_loop(
        {**INT8, "optimization.warmup": 0, "optimization.learning_rate": rate, "optimization.schedule": "constant"}
    )
    base = dequantized(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64))
    inside: Any = loop.stepper.model_inside()
    linear = inside.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert linear.weight.dtype == torch.int8
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    started = {n: p for n, p in inside.named_parameters() if p.requires_grad}
    wanted = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert started.keys() == wanted.keys() and all(p.dtype == torch.float32 for p in started.values())
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(started[name])
            parameter.data = parameter.data.double()
    optimizer = torch.optim.AdamW(wanted.values(), lr=rate, weight_decay=0.01)
    everything = [loop.batch(range(start, min(start + 4, len(loop.rows)))) for start in range(0, len(loop.rows), 4)]
    stored = linear.weight.clone()
    for _ in range(3):
        ours = loop.stepper.step(everything)
        loss = reference_loss(peft, samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours.loss == pytest.approx(float(loss), rel=2e-5)  # fp32 against float64, as for lora and qlora
    assert torch.equal(linear.weight, stored)


def test_an_evaluation_between_steps_changes_nothing(make_loop: Callable[..., Loop]) -> None:
    losses = []
    for evaluated in (False, True):
        loop = make_loop(INT8)
        for step in range(3):
            result = loop.stepper.step([loop.batch(loop.order.batch(step))])
            if evaluated:
                loop.stepper.model.eval()
                with torch.no_grad():
                    loop.stepper.loss(loop.batch([0]))
                loop.stepper.model.train()
        losses.append(result.loss)
    assert losses[0] == losses[1]


def test_checkpointing_does_not_free_the_inputs(make_loop: Callable[..., Loop]) -> None:
    """What the memory formula counts: with full checkpointing the inputs of dense linears go, those of 8-bit ones stay."""
    alive = {}
    for name, changes in {"lora": {"strategy.method": "lora"}, "int8": INT8}.items():
        loop = make_loop({**changes, "strategy.checkpointing": "full"})
        inside: Any = loop.stepper.model_inside()
        inputs: list[Any] = []
        base = inside.base_model.model.model.layers[0].mlp.down_proj
        base.register_forward_pre_hook(lambda module, args, kept=inputs: kept.append(weakref.ref(args[0])))
        loss = loop.stepper.loss(loop.batch([0])).sums.sum()
        alive[name] = inputs[0]() is not None
        loss.backward()
    assert alive == {"lora": False, "int8": True}


@pytest.mark.slow
def test_a_whole_run_leaves_an_adapter_that_peft_opens(
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    held_out_file: Path,
    by_template: Callable[[Path], Any],
    reference_loss: Callable[..., torch.Tensor],
) -> None:
    changes = {**INT8, "optimization.learning_rate": 1e-2, "optimization.max_steps": 20}
    folder, plan = api.begin(tiny_config(changes, output=str(tmp_path / "run")))
    assert plan.chosen and plan.chosen.method == "qlora"
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    found = record.read(folder)
    assert found["parameters"]["total"] == plan.model.params + plan.model.lora_params(4)
    assert found["evaluation"]["after"]["loss"] < found["evaluation"]["before"]["loss"] - 0.2
    why = {one["reason"] for one in found["kernels"]["skipped"]}
    assert found["kernels"]["applied"] and "LoRA around a Linear8bitLt" in why
    opened = AutoModelForCausalLM.from_pretrained(
        folder.model, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    opened.eval()
    with torch.no_grad():
        loss = float(reference_loss(opened, by_template(held_out_file)))
    # In eval mode bitsandbytes quantizes activations too, by the row, through fp16: 2^-11 of rounding each.
    assert loss == pytest.approx(found["evaluation"]["after"]["loss"], rel=1e-3)
