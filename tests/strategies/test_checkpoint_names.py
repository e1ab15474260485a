"""Experts that files hold one by one: every tensor of the model, and any rows of it, bit for bit as transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher.schema import Model
from trebuchet.strategies.checkpoint_names import Stacked, as_saved, held, rows_of, sources
from trebuchet.strategies.layouts import LayoutError
from trebuchet.strategies.streaming import Weights, skeleton

from .experts import EXPERTS, FAMILIES, save


def opened(folder: Path) -> Any:
    return skeleton(folder, Model(name=str(folder)), dtype=torch.float32, attention="sdpa")


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_that_of_transformers(family: str, one_by_one: bool, tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / "model", family, tiny_model, one_by_one=one_by_one)
    names = held(folder)
    assert any(".experts.2." in name for name in names) == one_by_one and len(set(names.values())) > 5
    wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    net = opened(folder)
    found = sources(net, folder)
    assert set(found) == set(wanted)
    assert sum(isinstance(source, Stacked) for source in found.values()) == (4 if one_by_one else 0)
    with Weights(folder, found, {}) as weights:
        for name, tensor in wanted.items():
            assert torch.equal(weights.rows(name, tensor.shape, 0, len(tensor)), tensor), name
            for first in (0, 1, len(tensor) - 1):
                assert torch.equal(weights.rows(name, tensor.shape, first, 1), tensor[first : first + 1]), name
    # What the model would be saved as is what it came from.
    again = {n: t for name, tensor in wanted.items() for n, t in as_saved(net, name, tensor)}
    assert set(again) == set(names)
    with Weights(folder, {n: n for n in names}, {}) as weights:
        assert all(torch.equal(weights.rows(n, t.shape, 0, len(t)), t) for n, t in again.items())


@given(st.data(), st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_rows_read_their_own_experts_and_no_others(data: st.DataObject, experts: int, heights: list[int]) -> None:
    parts = tuple(tuple(f"{p}.{e}" for e in range(experts)) for p in range(len(heights)))
    tensors = {name: torch.rand(heights[p], 3) for p, names in enumerate(parts) for name in names}
    whole = torch.stack([torch.cat([tensors[names[e]] for names in parts]) for e in range(experts)])
    start = data.draw(st.integers(0, experts - 1))
    count = data.draw(st.integers(1, experts - start))
    asked: list[str] = []
    found = rows_of(Stacked(parts), whole.shape, start, count, lambda name: (asked.append(name), tensors[name])[1])
    assert torch.equal(found, whole[start : start + count])
    assert sorted(asked) == sorted(names[e] for names in parts for e in range(start, start + count))


def test_experts_that_are_not_there_are_said(tmp_path: Path, tiny_model: Path) -> None:
    folder = save(tmp_path / "model", "mixtral", tiny_model)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())

    def without(*names: str) -> None:
        kept = {n: f for n, f in whole["weight_map"].items() if n not in names}
        assert len(kept) == len(whole["weight_map"]) - len(names)
        index.write_text(json.dumps({**whole, "weight_map": kept}))

    block = "model.layers.1.block_sparse_moe.experts"
    without(f"{block}.1.w3.weight")
    with pytest.raises(LayoutError, match=r"layers\.1.* 3 of .*w1.*, 2 of .*w3"):
        sources(opened(folder), folder)
    without(f"{block}.1.w2.weight")
    shape = torch.Size((EXPERTS, 64, 96))
    with (
        Weights(folder, sources(opened(folder), folder), {}) as weights,
        pytest.raises(LayoutError, match=r"2 experts, and config\.json says 3"),
    ):
        weights.rows("model.layers.1.mlp.experts.down_proj", shape, 0, 1)


def test_another_conversion_is_refused_by_its_name(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter, WeightRenaming

    rules = [
        WeightRenaming(".block_sparse_moe.", ".mlp."),
        WeightConverter(".experts.*.w2.weight", ".experts.down_proj", [MergeModulelist(dim=0), Transpose(1, 2)]),
    ]
    folder = save(tmp_path / "model", "mixtral", tiny_model)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda net: rules)
    with pytest.raises(
        LayoutError, match=r"keeps model\.layers\.0\.mlp\.experts\.down_proj in another form .*w2.*parallel=ddp"
    ):
        sources(opened(folder), folder)


@pytest.mark.parametrize(
    ("shape", "words"), [((2, 4, 3), r"p\.0 .* are 3 rows of 4"), ((2, 2, 3), "does not fit into")]
)
def test_experts_of_another_size_are_refused(shape: tuple[int, ...], words: str) -> None:
    source = Stacked((("p.0", "p.1"),))
    with pytest.raises(LayoutError, match=words):
        rows_of(source, torch.Size(shape), 0, 1, lambda name: torch.zeros(3, 3))
