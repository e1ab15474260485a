"""`patch` against the model as transformers and PEFT run it: loss and every gradient, generation, adapters, undoing,
the report.
"""

import copy
import json
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trebuchet.kernels import functional, patch_documents
from trebuchet.kernels.patch import patch, unpatch
from trebuchet.kernels.patch_report import KernelReport

sys.path.insert(0, str(Path(__file__).parent))
from patch_models import (
    FAMILIES,
    VOCAB,
    batch,
    gradients,
    model,
    randomize_adapters,
    token_loss,
    whole_logits_loss,
    worst,
)

# Both sides compute in fp32 and sum the same products in another order: 1e-6 to 5e-6 was seen.
FP32 = 2e-5
EXPERTS = ("mixtral", "olmoe")
ALL_FUSED = {"rope", "rms_norm", "add_rms_norm", "token_loss"}


def parity(net, b=None, tolerance=FP32):
    """Reference first, then patched: one model, so nothing but the forwards can differ."""
    b = b or batch()
    loss, theirs = gradients(net, whole_logits_loss(net, b))
    report = patch(net)
    ours_loss, ours = gradients(net, token_loss(net, b))
    assert ours_loss == pytest.approx(loss, rel=1e-5)
    difference, name = worst(ours, theirs)
    assert difference < tolerance, name
    return report


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_of_every_family(family, adapted):
    report = parity(model(family, lora={} if adapted else None))
    ops = {fused.op for fused in report.fused}
    if family not in ("cohere", "olmo2", "olmoe", "granite"):
        assert ops >= ALL_FUSED and (family in EXPERTS or {s.reason for s in report.skipped} == set())
    assert "token_loss" in ops and report.loss.startswith("per token in the head's forward")
    if adapted:
        assert ops & {"lora_qkv", "lora_linear"}
    if family not in ("phi3", *EXPERTS):
        assert any(op.startswith("lora_mlp") for op in ops)


def test_experts_are_reported_as_not_taken():
    report = patch(model("mixtral"))
    assert [s.count for s in report.skipped if s.module == "MixtralExperts"] == [2]


def test_biases_and_tied_embeddings():
    parity(model("llama", attention_bias=True, mlp_bias=True, lora={}))
    parity(model("llama", tie_word_embeddings=True))


def test_generation_is_unchanged_token_by_token():
    net = model(lora={}).eval()
    prompt = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    before = net.generate(input_ids=prompt, **options)
    with torch.no_grad():
        logits = net(input_ids=prompt, attention_mask=mask).logits
    patch(net)
    assert torch.equal(net.generate(input_ids=prompt, **options), before)
    with torch.no_grad():
        torch.testing.assert_close(net(input_ids=prompt, attention_mask=mask).logits, logits, rtol=1e-5, atol=1e-5)


def test_unpatch_restores_every_attribute_and_the_exact_loss():
    net, b = model(lora={}), batch()
    before = [dict(vars(m)) for m in net.modules()]
    attention = net.config._attn_implementation
    loss = whole_logits_loss(net, b)
    patch(net)
    patch(net)  # a second time must not make the first the original
    assert net.config._attn_implementation == patch_documents.NAME
    unpatch(net)
    assert net.config._attn_implementation == attention
    for module, old in zip(net.modules(), before, strict=True):
        assert vars(module).keys() == old.keys()
        assert all(vars(module)[name] is value for name, value in old.items() if name != "config")
    assert torch.equal(whole_logits_loss(net, b), loss)


def test_a_deep_copy_runs_on_its_own_weights():
    net = model(lora={})
    patch(net)
    twin, b = copy.deepcopy(net), batch()
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert token_loss(net, b).item() != token_loss(twin, b).item()
    assert token_loss(twin, b).item() == pytest.approx(torch.log(torch.tensor(float(VOCAB))).item())


def test_switched_off_adapters_give_the_base_model():
    net, b = model(lora={}), batch()
    patch(net)
    adapted = token_loss(net, b).item()
    with net.disable_adapter():
        off = token_loss(net, b)
        unpatched = copy.deepcopy(net)
        unpatch(unpatched)
        assert off.item() == pytest.approx(whole_logits_loss(unpatched, b).item(), rel=1e-6)
    assert abs(off.item() - adapted) > 1e-2
    assert token_loss(net, b).item() == adapted


def test_merged_adapters_are_in_the_base():
    net, b = model(lora={}), batch()
    patch(net)
    adapted = token_loss(net, b).item()
    net.merge_adapter()
    assert token_loss(net, b).item() == pytest.approx(adapted, rel=1e-5)


@pytest.mark.parametrize("lora, reason", [({"use_dora": True}, "variant of LoRA"), ({"lora_bias": True}, "has a bias")])
def test_other_adapters_run_as_before_and_are_named(lora, reason):
    bias = {"attention_bias": True, "mlp_bias": True}  # PEFT wants a bias below an adapter that has one
    report = parity(model("llama", lora=lora, **bias))
    left = [s for s in report.skipped if reason in s.reason]
    assert sum(s.count for s in left) == 14 and {f.op for f in report.fused} == {*ALL_FUSED, "swiglu"}


def test_several_active_adapters_run_as_before():
    net = model(lora={})
    net.add_adapter("second", net.peft_config["default"])
    randomize_adapters(net)
    net.base_model.set_adapter(["default", "second"])
    report = parity(net)
    assert any("several active adapters (default, second)" in s.reason for s in report.skipped)


def test_adapter_dropout_reaches_the_adapter_only():
    net, b = model(lora={"lora_dropout": 0.5}), batch()
    report = parity(net.eval(), b)
    assert {"lora_qkv", "lora_linear", "swiglu"} <= {f.op for f in report.fused}
    net.train()
    values = {token_loss(net, b).item() for _ in range(4)}
    with net.disable_adapter():
        base = {token_loss(net, b).item() for _ in range(2)}
    assert len(values) == 4 and len(base) == 1


def test_adapted_heads_and_saved_copies_of_the_head():
    report = parity(model(lora={"target_modules": ["q_proj", "lm_head"]}))
    assert "whole logits" in report.loss and "token_loss" not in {f.op for f in report.fused}
    report = parity(model(lora={"modules_to_save": ["lm_head"]}))
    assert report.loss.startswith("per token in the head's forward")


def test_a_forward_that_differs_from_the_known_text_is_left_alone():
    net = model()
    kind = type(net.model.layers[0].mlp)

    class OtherMLP(kind):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.5

    for layer in net.model.layers:
        layer.mlp.__class__ = OtherMLP
    report = parity(net)
    assert [(s.module, s.count) for s in report.skipped] == [("OtherMLP", 2)]


def test_a_forward_replaced_by_someone_else_is_left_alone():
    net, calls = model(), []
    norm = net.model.norm

    def counted(self, x):
        calls.append(1)
        return type(self).forward(self, x)

    norm.forward = MethodType(counted, norm)
    report = parity(net)
    assert len(calls) == 2 and ["replaced" in s.reason for s in report.skipped] == [True]
    unpatch(net)
    assert norm.forward.__func__ is counted


@pytest.mark.parametrize("head", ["known", "adapted"])
def test_statistics_of_the_softmax(head):
    net, b = model(lora={} if head == "known" else {"target_modules": ["lm_head"]}), batch()
    with torch.no_grad():
        z = net(input_ids=b["input_ids"], position_ids=b["position_ids"], use_cache=False).logits.double()
    patch(net)
    inputs = {"input_ids": b["input_ids"], "position_ids": b["position_ids"], "token_labels": b["labels"]}
    got = net(**inputs, token_entropy=True, token_argmax=True).token_loss
    valid, p = b["labels"] != -100, z.softmax(-1)
    wanted = [z.log_softmax(-1).gather(-1, b["labels"].clamp_min(0)[..., None]).squeeze(-1), z.logsumexp(-1)]
    wanted.append(-(p * p.log()).sum(-1))
    for name, ours, theirs in zip(("logp", "lse", "entropy"), got, wanted, strict=False):
        torch.testing.assert_close(
            ours.double()[valid], theirs[valid], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m
        )
        assert not ours[~valid].any()
    assert torch.equal(got.argmax[valid], z.argmax(-1)[valid])


def test_the_report_is_plain_data_and_switching_off_changes_nothing():
    net = model(lora={})
    report = patch(net)
    assert KernelReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.backend == "torch" and report.launch_table_hash == functional.launch_table_hash()
    counts = {(f.module, f.op): f.count for f in report.fused}
    assert counts["LlamaRMSNorm", "rms_norm"] == 5 and counts["LoRA Linear", "lora_qkv"] == 6
    assert counts["LoRA Linear", "lora_linear"] == 2 and counts["LlamaMLP", "lora_mlp (swiglu)"] == 2
    assert "6 LoRA Linear on lora_qkv" in report.text()
    off = patch(net, enable=False)
    assert not off.applied and off.text().startswith("Kernel layer: not applied")
    assert not any("kernel_saved" in vars(m) or "forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_by_document_errs_no_more_than_under_the_mask(dtype):
    lengths, module = [[5, 1, 40, 300], [346]], SimpleNamespace(num_key_value_groups=3, is_causal=True)
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 346, heads, 16, generator=g).to(dtype).transpose(1, 2) for heads in (6, 2, 2))
    up = torch.randn(2, 346, 6, 16, generator=g).to(dtype)
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]

    def run(attend, dtype, **options):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attend(module, *inputs, **options)[0]
        out.backward(up.to(dtype))
        return [out.detach(), *(t.grad for t in inputs)]

    exact = run(sdpa_attention_forward, torch.float64, attention_mask=mask)
    masked = run(sdpa_attention_forward, dtype, attention_mask=mask)
    ours = run(patch_documents._attend, dtype, attention_mask=None, document_lengths=lengths)
    for name, e, m, o in zip(("out", "dq", "dk", "dv"), exact, masked, ours, strict=True):
        assert (o.double() - e).norm() <= 1.5 * (m.double() - e).norm() + 1e-12 * e.norm(), name


def test_packed_rows_build_no_mask_unless_a_window_is_shorter(monkeypatch):
    made = []
    monkeypatch.setattr(patch_documents, "sdpa_mask", lambda **kw: made.append(kw["local_size"]))
    net, b = model("llama"), batch()
    patch(net)
    token_loss(net, b)
    assert made == []
    net = model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    patch(net)
    token_loss(net, b)
    assert made == [4]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_is_asked_for_the_same(family):
    """Windows and softcaps reach attention kernels as arguments that sdpa does not read."""
    asked = []

    def spy(module, query, key, value, mask, **options):
        asked.append(
            {name: v for name, v in options.items() if not isinstance(v, torch.Tensor)} | {"layer": module.layer_idx}
        )
        return sdpa_attention_forward(module, query, key, value, mask, **{**options, "softcap": None})

    AttentionInterface.register("spy", spy)
    net, b = model(family), batch()
    net.config._attn_implementation = "spy"
    whole_logits_loss(net, b)
    theirs = list(asked)
    asked.clear()
    patch(net)
    token_loss(net, b)
    assert asked == theirs and len(asked) == 2


def test_documents_of_packed_rows_do_not_see_each_other():
    net, b = model(), batch(rows=1)
    patch(net)
    logp = net(input_ids=b["input_ids"], position_ids=b["position_ids"], token_labels=b["labels"]).token_loss.logp
    changed = b["input_ids"].clone()
    changed[0, :10] = 5  # the first document has 10 tokens
    again = net(input_ids=changed, position_ids=b["position_ids"], token_labels=b["labels"]).token_loss.logp
    assert torch.equal(logp[0, 10:], again[0, 10:]) and not torch.equal(logp[0, :10], again[0, :10])
