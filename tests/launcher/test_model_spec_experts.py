"""What adapters a mixture of experts gets, against PEFT on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
from trebuchet.launcher.errors import ModelError

from .test_model_spec import MORE, SMALL, peft_count, reference, spec_of


def test_names_of_experts_are_those_that_peft_knows(tmp_path: Any) -> None:
    config = {"model_type": "mixtral", **SMALL, "num_local_experts": 3}
    spec = spec_of(config, tmp_path)
    for names in (["w1", "w2", "w3"], ["w1", "w3", "q_proj"], ["w2", "gate"]):
        assert spec.lora_params(4, tuple(names)) == peft_count(reference(config), 4, names)
    with pytest.raises(ModelError, match="w1 and w3 are one tensor"):
        spec.lora_params(4, ("w1",))
    with pytest.raises(ValueError, match="fused"):  # PEFT refuses the same
        peft_count(reference(config), 4, ["w1"])


@pytest.mark.parametrize("target", ["router", "gate_proj", "down_proj"])
def test_targets_that_cannot_have_an_adapter_are_refused(tmp_path: Any, target: str) -> None:
    """PEFT would leave the experts out without a word, and fail at the router's first call."""
    spec = spec_of({"model_type": "phimoe", **SMALL, **MORE["phimoe"]}, tmp_path)
    with pytest.raises(ModelError, match=f"'{target}' of phimoe cannot have an adapter; leave it out"):
        spec.lora_params(4, ("q_proj", target))


def test_dense_blocks_between_experts(tmp_path: Any) -> None:
    more = {"num_hidden_layers": 5, "num_experts": 3, "moe_intermediate_size": 48, "mlp_only_layers": [3]}
    config = {"model_type": "qwen3_moe", **SMALL, **more, "decoder_sparse_step": 2}
    spec, model = spec_of(config, tmp_path), reference(config)
    assert spec.params == model.num_parameters()
    assert spec.lora_params(4) == peft_count(model, 4, "all-linear")
