"""The product of method, layout, copies, offload, optimizer, objective and device against a table of what cannot work: each cell is
planned, or refused with the reason of a row that applies to it. tests/strategies/test_every_cell.py trains those that are planned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher.cluster import Cluster, NodeGroup
from trebuchet.launcher.config import build_config
from trebuchet.launcher.model_families import FAMILIES
from trebuchet.launcher.model_spec import ModelSpec, load_model_spec
from trebuchet.launcher.planner import make_plan

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "int8": {"method": "qlora", "quant": {"type": "int8"}},
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    method: str = "full"
    parallel: str = "none"
    copies: int | str = "auto"
    offload: str = "none"
    optimizer: str = "adamw"
    device: str = "cuda"
    ranks: int = 1
    dtype: str = "auto"
    objective: str = "sft"
    reference: str = "auto"
    dropout: float = 0.0

    @property
    def sharded(self) -> bool:
        return self.parallel in ("fsdp2", "zero3")

    @property
    def moved(self) -> bool:
        return self.offload != "none"


# What docs/strategies.md says in its table of refusals, and the arithmetic of ranks.
REFUSED: list[tuple[Callable[[Cell], bool], str]] = [
    (lambda c: c.parallel == "none" and c.ranks > 1, "parallel none is for one rank"),
    (lambda c: c.parallel == "ddp" and c.ranks == 1, "ddp keeps copies on several ranks in step"),
    (lambda c: c.moved and c.parallel == "ddp", "DDP keeps everything on the GPU"),
    (lambda c: c.moved and c.parallel == "none", "nothing moves to the host without a layout that does it"),
    (lambda c: c.moved and c.device == "cpu", "on a CPU everything is in host memory already"),
    (lambda c: c.offload == "optimizer" and c.parallel == "fsdp2", "FSDP2 moves parameters and optimizer states"),
    (lambda c: c.offload == "optimizer" and c.method != "full", "adapters' optimizer states are small"),
    (lambda c: c.parallel == "fsdp2" and c.copies not in ("auto", 1) and c.ranks % int(c.copies) > 0, "does not divide"),
    (lambda c: c.parallel == "fsdp2" and c.copies not in ("auto", 1) and c.copies == c.ranks, "nothing is left to shard"),
    (lambda c: c.parallel != "fsdp2" and c.copies not in ("auto", 1), "is a number of sharded copies"),
    (lambda c: c.device == "cpu" and c.optimizer == "paged-adamw-8bit", "on a CPU there is one memory"),
    (lambda c: c.moved and c.optimizer == "paged-adamw-8bit", "a paged optimizer lives in GPU memory"),
    (lambda c: c.moved and c.optimizer != "adamw", "steps where its states are"),
    (lambda c: c.parallel == "zero3" and c.optimizer != "adamw", "ZeRO-3 steps one flat vector"),
    (lambda c: c.parallel == "zero3" and c.dtype == "fp16", "the loss scale of fp16 is the loop's"),
    (lambda c: c.method == "int8" and (c.sharded or c.moved), "LLM.int8 keeps the scales"),
    (lambda c: c.reference == "adapters_off" and c.method == "full", "adapters_off needs adapters"),
    (lambda c: c.reference == "copy" and c.sharded, "a second copy is not sharded"),
]  # fmt: skip


def reason_for(cell: Cell, model: ModelSpec | None = None, name: str = NAME) -> str | None:
    """Why the planner refuses a cell, None where it plans it; on a machine so large that memory refuses nothing."""
    gpu = {"gpu": "X", "gpus_per_node": cell.ranks, "gpu_memory_gib": 6400.0, "peak_tflops": {"bf16": 9.0, "fp16": 9.0}}
    group = NodeGroup(cores=64, host_memory_gib=40960.0, **(gpu if cell.device == "cuda" else {}))
    layout = {"parallel": cell.parallel, "dp_replicate": cell.copies, "offload": cell.offload, "checkpointing": "none"}
    objective = {"name": cell.objective} | ({} if cell.reference == "auto" else {"reference": cell.reference})
    config = build_config(
        {
            "model": {"name": name, "dtype": cell.dtype},
            "data": {"train": "t", "max_length": 64},
            "objective": objective,
            "strategy": {**METHODS[cell.method], **layout, "lora": {"dropout": cell.dropout}},
            "optimization": {"optimizer": cell.optimizer, "global_batch_size": 8, "micro_batch": 1},
            "cluster": {"name": "local", "processes": cell.ranks},
        }
    )
    found = make_plan(config, model or load_model_spec(config.model), Cluster(name="large", groups=(group,)))
    if found.chosen is None:
        (no,) = found.rejected
        assert no.needed_gib is None and (no.method, no.parallel, no.offload) == (
            config.strategy.method,
            cell.parallel,
            cell.offload,
        )
        return no.reason
    chosen = found.chosen
    assert (chosen.parallel, chosen.offload, chosen.optimizer) == (cell.parallel, cell.offload, cell.optimizer)
    assert (chosen.method, chosen.ranks) == (config.strategy.method, cell.ranks)
    assert cell.copies == "auto" or chosen.dp_replicate == cell.copies or cell.copies == 1
    return None


def compared(cells: list[Cell]) -> tuple[int, int]:
    """(planned, refused), each as the table says; and no row of it is one that applies to nothing."""
    model = load_model_spec(build_config({"model": NAME, "data": "t"}).model)
    refused = 0
    for cell in cells:
        wanted = [words for applies, words in REFUSED if applies(cell)]
        reason = reason_for(cell, model)
        assert (reason is None) == (not wanted), (cell, reason, wanted)
        assert reason is None or any(words in reason for words in wanted), (cell, reason, wanted)
        refused += reason is not None
    return len(cells) - refused, refused


def test_every_way_to_spread_a_method() -> None:
    product = itertools.product(
        METHODS, ("none", "ddp", "fsdp2", "zero3"), ("none", "optimizer", "params"),
        ("adamw", "adamw-8bit", "adamw-8bit-kernel", "paged-adamw-8bit"), ("cpu", "cuda"), (1, 2),
    )  # fmt: skip
    cells = [Cell(method=m, parallel=p, offload=o, optimizer=opt, device=d, ranks=n) for m, p, o, opt, d, n in product]
    cells += [replace(cell, dtype="fp16") for cell in cells if cell.device == "cuda" and cell.optimizer == "adamw"]
    planned, refused = compared(cells)
    assert (planned, refused) == (144, 720)


def test_copies_of_shards() -> None:
    product = itertools.product(METHODS, ("none", "ddp", "fsdp2", "zero3"), (1, 2, 3, 4), (1, 2, 4), ("none", "params"))
    cells = [Cell(method=m, parallel=p, copies=c, ranks=n, offload=o) for m, p, c, n, o in product]
    planned, refused = compared(cells)
    assert planned > 40 and refused > 200


def test_objectives_and_their_references() -> None:
    layouts = ("none", "ddp", "fsdp2", "zero3")
    cells = [
        Cell(method=m, parallel=p, ranks=1 if p == "none" else 2, objective=name)
        for m, p, name in itertools.product(METHODS, layouts, ("pretrain", "orpo", "simpo", "cpo", "reward"))
    ]
    cells += [
        Cell(method=m, parallel=p, ranks=1 if p == "none" else 2, objective=name, reference=r)
        for m, p, name, r in itertools.product(
            METHODS, layouts, ("dpo", "kto"), ("auto", "adapters_off", "precomputed", "copy")
        )
    ]
    planned, refused = compared(cells)
    assert planned > 100 and refused > 40


def test_no_row_of_the_table_is_idle() -> None:
    """Each reason is the planner's own in some cell: the one row that applies to it."""
    one = {
        "parallel none is for one rank": Cell(ranks=2),
        "ddp keeps copies": Cell(parallel="ddp"),
        "DDP keeps everything": Cell(parallel="ddp", ranks=2, offload="params"),
        "nothing moves": Cell(offload="params"),
        "on a CPU everything": Cell(parallel="fsdp2", ranks=2, offload="params", device="cpu"),
        "FSDP2 moves": Cell(parallel="fsdp2", ranks=2, offload="optimizer"),
        "adapters' optimizer": Cell(method="lora", parallel="zero3", ranks=2, offload="optimizer"),
        "does not divide": Cell(parallel="fsdp2", ranks=4, copies=3),
        "nothing is left to shard": Cell(parallel="fsdp2", ranks=4, copies=4),
        "is a number of sharded": Cell(parallel="zero3", ranks=4, copies=2),
        "on a CPU there is one": Cell(device="cpu", optimizer="paged-adamw-8bit"),
        "a paged optimizer": Cell(parallel="fsdp2", ranks=2, offload="params", optimizer="paged-adamw-8bit"),
        "steps where its states": Cell(parallel="fsdp2", ranks=2, offload="params", optimizer="adamw-8bit"),
        "ZeRO-3 steps": Cell(parallel="zero3", ranks=2, optimizer="adamw-8bit"),
        "the loss scale": Cell(parallel="zero3", ranks=2, dtype="fp16"),
        "LLM.int8 keeps": Cell(method="int8", parallel="fsdp2", ranks=2),
        "adapters_off needs": Cell(objective="dpo", reference="adapters_off"),
        "a second copy": Cell(objective="dpo", reference="copy", parallel="fsdp2", ranks=2),
    }
    assert len(one) == len(REFUSED)
    for (words, cell), (applies, row) in zip(one.items(), REFUSED, strict=True):
        assert applies(cell) and row.startswith(words[:12])
        assert words in (reason_for(cell) or ""), cell


@pytest.mark.parametrize(
    ("name", "cell", "words"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", Cell(method="lora", dropout=0.1), "there is no input to drop"),
        ("mistralai/Mixtral-8x7B-v0.1", Cell(method="lora"), None),
        ("mistralai/Mixtral-8x7B-v0.1", Cell(dropout=0.1), None),
        (NAME, Cell(method="lora", dropout=0.1), None),
        (NAME, Cell(objective="reward"), None),
    ],
)
def test_what_a_family_cannot_be_put_through(name: str, cell: Cell, words: str | None) -> None:
    reason = reason_for(cell, name=name)
    assert (words is None and reason is None) or (words is not None and words in (reason or ""))


@pytest.mark.parametrize(
    ("parallel", "method", "refused"),
    [("fsdp2", "qlora", True), ("zero3", "qlora", True), ("ddp", "qlora", False), ("fsdp2", "lora", False)],
)
def test_matrices_that_blocks_of_64_do_not_divide(parallel: str, method: str, refused: bool, tmp_path: Path) -> None:
    """6 x 10 query weights; in one process bitsandbytes pads them, and a shard cannot."""
    sizes = {"hidden_size": 10, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    more = {"model_type": "llama", "vocab_size": 64, "head_dim": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **more}))
    reason = reason_for(Cell(method=method, parallel=parallel, ranks=2), name=str(tmp_path))
    assert ("self_attn.q_proj is 6 x 10" in (reason or "")) == refused == (reason is not None)


@pytest.mark.parametrize(("objective", "refused"), [("reward", True), ("dpo", False)])
def test_a_reward_model_of_a_family_without_a_score_class(objective: str, refused: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granite", "num_hidden_layers": 1}))
    reason = reason_for(Cell(objective=objective), name=str(tmp_path))
    assert ("no score model of the family granite" in (reason or "")) == refused == (reason is not None)


def test_score_models_are_those_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    assert {name for name, family in FAMILIES.items() if family.score} == set(FAMILIES) & set(NAMES)
