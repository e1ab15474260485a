"""`trebuchet merge` of mixtures of experts: a base that keeps them one by one, and adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trebuchet.launcher import api, worker
from trebuchet.strategies.checkpoint_names import held
from trebuchet.training import merge as merging
from trebuchet.training.finished import open_finished

from ..strategies.experts import FAMILIES, save


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_written_as_the_base_has_them(
    family: str, one_by_one: bool, tiny_model: Path, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """From a base that keeps them one by one, or those of a block in one tensor, in small files; whether PEFT adapts the experts of the
    family (all but phimoe) or not. What the merged model answers: test_families.py."""
    base = save(tmp_path / "base", family, tiny_model, one_by_one=one_by_one)
    changes = {
        "model.name": str(base),
        "strategy.method": "lora",
        "strategy.lora": {"r": 4, "alpha": 8},
        "tracking": [],
    }
    folder, plan = api.begin(tiny_config({**changes, "optimization.max_steps": 1}, output=str(tmp_path / "run")))
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    adapted = any("experts" in name for name in load_file(folder.model / "adapter_model.safetensors"))
    assert adapted == (family != "phimoe")
    merging.merge(open_finished(str(folder.root)), folder.merged, merging.Options(shard_bytes=60_000))
    before, after = held(base), held(folder.merged)
    assert before.keys() == after.keys() and len(set(after.values())) > 1
    assert (
        max(file.stat().st_size for file in folder.merged.glob("*.safetensors"))
        < 150_000  # a block's experts in one tensor are 147 kB
    )  # the embedding is 82 kB alone
