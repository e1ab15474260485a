"""Every family of the table trains by every method, is left whole, and merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trebuchet.launcher import api, record, worker
from trebuchet.launcher.errors import NothingFits
from trebuchet.launcher.model_families import FAMILIES, NO_SDPA
from trebuchet.training import merge as merging
from trebuchet.training.finished import open_finished

from ..strategies.experts import save
from .merged import by_peft, logits, opened

pytestmark = pytest.mark.slow
ONE_BY_ONE = {"experts_implementation": "eager"}  # torch's grouped product knows no float64


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_is_left_whole_and_merges(
    family: str, method: str, tiny_model: Path, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    base = save(tmp_path / "base", family, tiny_model)
    changes = {
        "model.name": str(base),
        "strategy.method": method,
        "strategy.lora": {"r": 4, "alpha": 8},
        "tracking": [],
    }
    few = {"optimization.learning_rate": 1e-2, "optimization.max_steps": 4, "evaluation.every": 100}
    folder, plan = api.begin(tiny_config({**changes, **few}, output=str(tmp_path / "run")))
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    found = record.read(folder)["evaluation"]
    assert found["after"]["loss"] < found["before"]["loss"]
    if method == "full":
        assert opened(folder.model).num_parameters() == plan.model.params
        return
    merged = merging.merge(open_finished(str(folder.root)), folder.merged, merging.Options())
    assert not merged["unread"] and merged["difference"]["relative"] < 1e-5
    if method == "lora":
        wanted = logits(by_peft(opened(base, **ONE_BY_ONE), folder.model))
        torch.testing.assert_close(logits(opened(folder.merged, **ONE_BY_ONE)), wanted, rtol=1e-4, atol=1e-5)


def test_where_transformers_has_no_sdpa_attention_is_eager(
    tiny_model: Path, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Chosen by the planner, and refused where the user asks for sdpa."""
    base = save(tmp_path / "base", "gemma2", tiny_model)
    config = tiny_config({"model.name": str(base), "tracking": []}, output=str(tmp_path / "run"))
    chosen = api.plan(config).chosen
    assert chosen is not None and chosen.attention == "eager"
    config["model"]["attention"] = "sdpa"
    with pytest.raises(
        NothingFits, match=r"no scaled_dot_product_attention for gemma2; leave model\.attention on auto"
    ):
        api.begin(config)
    assert not (tmp_path / "run").exists()


def test_the_planner_knows_which_classes_have_no_sdpa() -> None:
    """Of every text decoder that this transformers has a class for; those that are no decoders, or have experts, never come so far."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kinds = {
        *FAMILIES,
        *NO_SDPA,
        "gpt2",
        "opt",
        "gpt_neox",
        "stablelm",
        "starcoder2",
        "phi",
        "cohere",
        "glm",
        "nemotron",
        "olmo",
    }
    without = {kind for kind in kinds if not getattr(transformers, NAMES[kind])._supports_sdpa}
    assert without == NO_SDPA
