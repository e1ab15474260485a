"""The patched model under what training does to a model: checkpointing, autocast, compilation, fake tensors, 4-bit
weights, steps.
"""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from trebuchet.kernels import functional
from trebuchet.kernels.patch import patch
from trebuchet.strategies.fake_memory import materialize, step_memory

sys.path.insert(0, str(Path(__file__).parent))
from patch_models import VOCAB, batch, gradients, model, quantized, token_loss, whole_logits_loss, worst

FP32 = 2e-5  # fp32 sums in another order: 1e-6 to 5e-6 was seen
GIB = 2**30


def build(adapted):
    return model("llama", lora={} if adapted else None)


def reference(adapted):
    net = build(adapted)
    return gradients(net, whole_logits_loss(net, batch()))


def check(net, loss, expected, tolerance=FP32):
    value, ours = gradients(net, loss)
    assert value == pytest.approx(expected[0], rel=1e-5)
    difference, name = worst(ours, expected[1])
    assert difference < tolerance, name


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_gradient_checkpointing(adapted, reentrant):
    net = build(adapted)
    patch(net)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    net.enable_input_require_grads()
    functional.reset_calls()
    check(net, token_loss(net, batch()), reference(adapted))
    assert functional.calls()["lora_mlp"] == {"torch": 4}, "two layers, forward and again in the backward pass"


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_autocast_errs_no_more_than_the_model_under_autocast(adapted):
    exact = reference(adapted)[1]
    net, errors = build(adapted), []
    for loss in (whole_logits_loss, token_loss):
        if loss is token_loss:
            patch(net)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(net, batch())
        assert value.dtype == torch.float32
        found = gradients(net, value)[1]
        assert all(g.dtype == torch.float32 for g in found.values())
        flat = [(torch.cat([(found[n] - exact[n]).flatten() for n in exact]).norm()).item()]
        errors += flat
    assert 0 < errors[1] <= 1.5 * errors[0]


def test_lora_on_a_16_bit_base_computes_in_its_dtype_with_fp32_gradients(monkeypatch):
    net, b = build(True), batch()
    exact = gradients(net, whole_logits_loss(net, b))[1]
    for name, p in net.named_parameters():
        if "lora_" not in name:
            p.data = p.data.bfloat16()
    theirs = gradients(net, whole_logits_loss(net, b))[1]
    patch(net)
    seen, op = [], torch.ops.trebuchet.lora_project.default
    from trebuchet.kernels import lora

    monkeypatch.setattr(lora, "lora_project", lambda x, *rest: seen.append(x.dtype) or op(x, *rest))
    ours = gradients(net, token_loss(net, b))[1]
    assert set(seen) == {torch.bfloat16} and all(g.dtype == torch.float32 for g in ours.values())
    error = {k: sum((g[n] - exact[n]).square().sum() for n in exact) ** 0.5 for k, g in (("o", ours), ("t", theirs))}
    # The base's own rounding dominates; PEFT runs the adapters in fp32 on top of it, this layer in bf16.
    assert error["o"] <= 1.5 * error["t"]


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_compiles_as_one_graph(adapted):
    torch._dynamo.reset()
    net, b = model("llama", lora={} if adapted else None, num_hidden_layers=1), batch()
    expected = gradients(net, whole_logits_loss(net, b))
    patch(net)
    check(net, token_loss(torch.compile(net, fullgraph=True, backend="aot_eager"), b), expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_runs_on_fake_tensors(adapted):
    with torch.device("meta"):
        net = build(adapted)
        patch(net)
    wanted = {n: p.shape for n, p in net.named_parameters() if p.requires_grad}
    with FakeTensorMode(allow_non_fake_inputs=False):
        materialize(net, "cpu")
        ids = torch.zeros(2, 24, dtype=torch.long)
        loss = -net(input_ids=ids, token_labels=ids, use_cache=False).token_loss.logp.sum()
        loss.backward()
        assert {n: p.grad.shape for n, p in net.named_parameters() if p.grad is not None} == wanted


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=["uint8", "bf16"])
def test_4bit_base(storage):
    net, b = quantized(storage), batch()
    expected = gradients(net, whole_logits_loss(net, b))
    report = patch(net)
    assert {(f.module, f.op, f.count) for f in report.fused} >= {
        ("LoRA NF4", "lora_qkv", 6),
        ("LoRA NF4", "lora_linear", 2),
    }
    check(net, token_loss(net, b), expected)
    net.eval()
    with torch.no_grad():  # would repack the weights on a CPU with AVX512-BF16
        net(input_ids=b["input_ids"][:, :1], use_cache=False)
        token_loss(net, b)
    check(net.train(), token_loss(net, b), expected)
    functional.reset_calls()
    with torch.no_grad():
        net(input_ids=b["input_ids"][:1, :1], use_cache=False)
    assert "nf4_dequantize" not in functional.calls(), "one token without gradients is bitsandbytes' to compute"


@pytest.mark.slow
def test_thirty_steps_with_and_without_the_layer():
    text = torch.tensor(list(inspect.getsource(torch.nn.Module).encode()[: 30 * 4 * 65]), dtype=torch.long) % VOCAB
    rows = text.view(30, 4, 65)
    losses = []
    for patched in (False, True):
        net = model("llama", initializer_range=0.02)
        net.apply(net._init_weights)
        for p in net.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(p.numel()))
            else:
                torch.nn.init.ones_(p)
        if patched:
            patch(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        curve = []
        for row in rows:
            b = {"input_ids": row[:, :-1], "labels": row[:, 1:], "position_ids": torch.arange(64).expand(4, -1)}
            loss = (token_loss if patched else whole_logits_loss)(net, b)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < 0.75 * losses[0][0], "the model must learn something"
    # AdamW divides by the root of a second moment that is near zero at first, so fp32 rounding grows a little by step.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_memory_of_an_8b_lora_step_on_fake_tensors():
    """Llama-3-8B's shape with 2 and 4 of 32 layers, r 16, bf16, 2 x 2,048 tokens: the bounds for 32 layers, less 24
    layers' share.
    """
    checkpointed, whole = _8b(layers=2, checkpointed=True), _8b(layers=2, checkpointed=False)
    more = _8b(layers=4, checkpointed=True), _8b(layers=4, checkpointed=False)
    per_layer = [(m.peak_bytes - f.peak_bytes) / 2 for f, m in zip((checkpointed, whole), more, strict=True)]
    assert checkpointed.peak_bytes + 30 * per_layer[0] <= 2.0 * GIB
    assert whole.peak_bytes + 30 * per_layer[1] <= 15 * GIB


def _8b(layers, checkpointed):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def made():
        config = LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, attn_implementation="sdpa",
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        try:
            net = LlamaForCausalLM(config)
            net = get_peft_model(net, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
        finally:
            torch.set_default_dtype(torch.float32)
        patch(net)
        if checkpointed:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            net.enable_input_require_grads()
        return net.train()

    def loss(net):
        ids = torch.zeros(2, 2048, dtype=torch.long)
        return -net(input_ids=ids, use_cache=False, token_labels=ids).token_loss.logp.sum()

    return step_memory(made, loss)
