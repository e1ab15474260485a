"""Mixtures of experts over two ranks, from files that hold the experts one by one: loaded bit for bit as transformers loads them,
trained as one process trains them, and left behind as they came."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Run
from .experts import save

pytestmark = pytest.mark.slow
# fp32, sums in another order; a routing probability may tip only where two are equal to rounding, which these weights have not.
LOSS, NORM = 1e-6, 1e-5
METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"r": 2}},
    "qlora": {"method": "qlora", "lora": {"r": 2}},
}
CELLS = {f"{parallel} {method}": (parallel, method) for parallel in ("fsdp2", "zero3") for method in METHODS}
OTHERS = {
    f"{family} {parallel}": (family, parallel) for family in ("phimoe", "qwen3_moe") for parallel in ("fsdp2", "zero3")
}
EXPORTED = ("full", "lora")  # adapters on a 4-bit base are gathered as others are
SMALL_FILES = 60_000  # bytes; a file ends within the experts of a block


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return save(tmp_path_factory.mktemp("experts"), "mixtral", tiny_model)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model: Path, run_cells: Run) -> dict[str, list[dict[str, Any]]]:
    def cell(method: str, parallel: str, **more: Any) -> dict[str, Any]:
        strategy = {**METHODS[method], "parallel": parallel}
        return {"model": str(model), "strategy": strategy, "steps": [0, 2], "export": method in EXPORTED, **more}

    one = {f"one {m}": cell(m, "none") for m in METHODS}
    two = {name: cell(m, p, loaded=True) for name, (p, m) in CELLS.items()}
    for parallel in ("fsdp2", "zero3"):
        two[f"{parallel} full"]["shard_bytes"] = SMALL_FILES
    groups = [{"world": 1, "name": "one", "cells": one}, {"world": 2, "name": "two", "cells": two}]
    return run_cells(tmp_path_factory.mktemp("experts"), groups)


@pytest.mark.parametrize("name", CELLS)
def test_every_tensor_is_that_of_transformers(found: dict[str, list[dict[str, Any]]], model: Path, name: str) -> None:
    """What 4 bit packs is left to test_matrix.py; experts stay in 16 bits or more, as bitsandbytes leaves them. Two ranks share the
    three experts of each block as 2 and 1."""
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    wanted = {
        key: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for key, tensor in reference.state_dict().items()
        if not (name.endswith("qlora") and "self_attn" in key)
    }
    for rank in found[name]:
        assert {plain(key): digest for key, digest in rank["loaded"].items()} == wanted
        assert name.startswith("zero3") or rank["kinds"] == ["DTensor"]
        assert rank["local_bytes"] < 0.7 * rank["whole_bytes"]
    assert sum(rank["local_bytes"] for rank in found[name]) < 1.01 * found[name][0]["whole_bytes"]


def plain(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    while ".base_layer." in name:
        name = name.replace(".base_layer.", ".")
    return name


@pytest.mark.parametrize("name", CELLS)
def test_steps_are_those_of_one_process(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    one = found[f"one {CELLS[name][1]}"][0]
    for rank in found[name]:
        assert rank["tokens"] == one["tokens"]
        assert rank["losses"] == pytest.approx(one["losses"], rel=LOSS)
        assert rank["norms"] == pytest.approx(one["norms"], rel=NORM)
        assert set(rank["calls"]) == set(one["calls"])
    assert one["norms"][0] > 0.01 and len(set(one["losses"])) == 2


@pytest.mark.parametrize("name", [name for name, (_, method) in CELLS.items() if method in EXPORTED])
def test_what_is_left_has_the_names_of_the_base_and_opens(
    found: dict[str, list[dict[str, Any]]], model: Path, name: str
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folders = [Path(found[which][0]["model"]) for which in (name, f"one {CELLS[name][1]}")]
    shapes = [
        {n: t.shape for file in folder.glob("*.safetensors") for n, t in load_file(file).items()} for folder in folders
    ]
    assert shapes[0] == shapes[1] and any(".experts." in n for n in shapes[0])
    if name.endswith("full"):
        index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(shapes[0]) == set(index) and len(list(folders[0].glob("*.safetensors"))) > 5
    opened: Any = AutoModelForCausalLM.from_pretrained(folders[0])
    with torch.no_grad():
        logits = opened(torch.arange(3, 35)[None]).logits
    torch.testing.assert_close(
        logits, torch.load(folders[0] / "logits.pt"), rtol=1e-4, atol=1e-4
    )  # fp32, other kernels
