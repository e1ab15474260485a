"""A pair costs what two rows of sft cost: live bytes of a whole step on fake tensors, every objective, full and LoRA."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from trebuchet.kernels.patch import patch
from trebuchet.launcher.schema import Objective
from trebuchet.strategies.fake_memory import StepMemory, step_memory
from trebuchet.training.objectives import make
from trebuchet.training.reference import AdaptersOff, Precomputed

VOCABULARY, TOKENS, PAIRS = 32768, 512, 2
WHOLE_LOGITS = VOCABULARY * TOKENS * 2 * PAIRS * 2  # bytes of all logits of the pairs, in 16 bits


def build(method: str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    net: Any = LlamaForCausalLM(config)
    if method == "lora":
        net = get_peft_model(
            net.to(torch.bfloat16), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    patch(net)
    return net.train()


def batch(documents: int) -> dict[str, Any]:
    """`documents` rows of one document each; positions are left to transformers, which takes fake ones for packed rows."""
    ids = torch.zeros(documents, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": None, "sizes": [TOKENS] * documents}


@lru_cache
def step(name: str, method: str) -> StepMemory:
    objective: Any = make(Objective(name=name))  # type: ignore[arg-type]

    def loss(model: torch.nn.Module) -> torch.Tensor:
        made = batch(2 * PAIRS)
        if name in ("dpo", "kto"):
            objective.reference = AdaptersOff() if method == "lora" else Precomputed()
            made["reference"] = torch.zeros(2 * PAIRS)
        if name == "orpo":
            made["compared"] = torch.ones_like(made["labels"], dtype=torch.bool)
        if name == "kto":
            made |= {
                "wanted": torch.ones(2 * PAIRS, dtype=torch.bool),
                "mismatched": {**batch(2 * PAIRS), "reference": made["reference"]},
            }
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                moved, count = objective.divergence(model, made, kernels=True)
            made["divergence"] = moved / count
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return objective(model, made, kernels=True).sums.sum()

    return step_memory(lambda: build(method), loss)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "cpo", "kto"])
def test_a_pair_costs_what_two_rows_of_sft_cost(name: str, method: str) -> None:
    sft, found = step("sft", method), step(name, method)
    assert max(found.forward_peak_bytes, found.backward_peak_bytes) <= 1.02 * max(
        sft.forward_peak_bytes, sft.backward_peak_bytes
    )
    assert found.kept_by_forward_bytes <= 1.02 * sft.kept_by_forward_bytes


def test_the_logits_of_both_sides_are_never_whole() -> None:
    """They would be most of the step: all that DPO holds over the weights stays below them."""
    found = step("dpo", "lora")
    assert max(found.forward_peak_bytes, found.backward_peak_bytes) < WHOLE_LOGITS
