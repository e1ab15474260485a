"""`trebuchet merge` of mixtures of experts: a base that keeps them one by one, and adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trebuchet.launcher import api, worker
from trebuchet.strategies.checkpoint_names import held
from trebuchet.training import merge as merging
from trebuchet.training.finished import open_finished

from ..strategies.experts import FAMILIES, save
from .merged import by_peft, logits, opened


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_written_as_the_base_has_them(
    family: str, method: str, tiny_model: Path, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """From a base that keeps them one by one, whether PEFT adapts the experts of the family (all but phimoe) or not."""
    base = save(tmp_path / "base", family, tiny_model)
    changes = {
        "model.name": str(base),
        "strategy.method": method,
        "strategy.lora": {"r": 4, "alpha": 8},
        "tracking": [],
    }
    tree = tiny_config(
        {**changes, "optimization.learning_rate": 1e-2, "optimization.max_steps": 3}, output=str(tmp_path / "run")
    )
    folder, plan = api.begin(tree)
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    assert any("experts" in name for name in load_file(folder.model / "adapter_model.safetensors")) == (
        family != "phimoe"
    )
    run = open_finished(str(folder.root))
    found = merging.merge(run, folder.merged, merging.Options(shard_bytes=60_000))
    assert not found["unread"] and found["difference"]["relative"] < 1e-5
    before, after = held(base), held(folder.merged)
    assert before.keys() == after.keys() and len(set(after.values())) > 1
    one_by_one = {"experts_implementation": "eager"}  # torch's grouped product knows no float64
    merged = logits(opened(folder.merged, **one_by_one))
    if method == "lora":  # what 4 bit do to the others is measured above
        wanted = logits(by_peft(opened(base, **one_by_one), folder.model))
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)
    assert merged.sub(logits(opened(base, **one_by_one))).abs().max() > 1e-3  # and not the base
