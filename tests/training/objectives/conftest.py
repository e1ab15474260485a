"""Pairs and labelled answers for the tiny model, a loop over them whose policy has moved, and TRL on the same rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ...conftest import WORDS, write_jsonl

COUNT = 12


def pairs(count: int = COUNT, start: int = 0) -> list[dict[str, Any]]:
    """Text rows of uneven length: the answer in order is chosen, the one in reverse with a word more rejected."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * 3 + j * (i % 5 + 1)) % len(WORDS)] for j in range(2 + i * 7 % 9)]
        prompt = f"{i} " + " ".join(words) + ":"
        chosen, rejected = " " + " ".join(words), " " + " ".join([*reversed(words), WORDS[i % 8]][: 1 + i % 7])
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def judged(count: int = COUNT, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"] if i % 3 else row["rejected"], "label": bool(i % 3)}
        for i, row in enumerate(pairs(count, start))
    ]


def answers(count: int = COUNT, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(count, start)]


def texts(count: int = COUNT, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": row["prompt"] + row["chosen"]} for row in pairs(count, start)]


KINDS = {"kto": "judged", "sft": "answers", "pretrain": "texts"}


@pytest.fixture(scope="session")
def compared_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("compared")
    return {
        name: str(write_jsonl(folder / f"{name}.jsonl", rows))
        for name, rows in {
            "pairs": pairs(),
            "pairs-eval": pairs(6, 100),
            "judged": judged(),
            "judged-eval": judged(6, 100),
            "answers": answers(),
            "answers-eval": answers(6, 100),
            "texts": texts(),
            "texts-eval": texts(6, 100),
        }.items()
    }


@pytest.fixture
def compare(make_loop: Callable[..., Any], compared_files: dict[str, str]) -> Callable[..., Any]:
    """The loop of an objective in fp32, its parameters moved away from the reference by seeded noise."""

    def build(objective: Mapping[str, Any], changes: Mapping[str, Any] | None = None, *, moved: bool = True) -> Any:

        kind = KINDS.get(objective["name"], "pairs")
        settings = {
            "data.train": compared_files[kind],
            "data.eval": compared_files[f"{kind}-eval"],
            "objective": dict(objective),
            "optimization.global_batch_size": COUNT,
            "optimization.micro_batch": COUNT,
            "optimization.max_grad_norm": 0,
            "data.packing": False,
        }
        loop = make_loop(settings | dict(changes or {}))
        if moved:
            move(loop.stepper.model_inside())
        return loop

    def move(model: torch.nn.Module) -> None:  # type: ignore[name-defined]  # noqa: F821
        import torch

        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)

    return build


def in_file_order(loop: Any) -> list[tuple[int, ...]]:
    """The rows of an unpacked set in the order of the file, as TRL reads them."""
    assert sorted(loop.rows) == [(i,) for i in range(len(loop.rows))]
    return [(row,) for row in range(len(loop.rows))]


def gradient(model: Any) -> dict[str, Any]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def trl(tiny_model: Path, tmp_path: Path) -> Callable[..., tuple[float, dict[str, Any]]]:
    """(loss, gradient by parameter name) of a TRL trainer on the first batch of `rows`, for a copy of `policy`."""

    def run(
        trainer: Any, config: Any, policy: Any, rows: list[dict[str, Any]], *, reference: bool, folder: Path = tiny_model,
        **settings: Any,
    ) -> Any:  # fmt: skip
        trainer = make_trainer(trainer, config, policy, rows, reference=reference, folder=folder, **settings)
        model = trainer.model
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        return float(loss.detach()), gradient(model)

    def make_trainer(
        trainer: Any, config: Any, policy: Any, rows: list[dict[str, Any]], *, reference: bool, folder: Path = tiny_model,
        **settings: Any,
    ) -> Any:  # fmt: skip
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": len(rows), "bf16": False,
            "gradient_checkpointing": False, "report_to": [], "use_cpu": True, "max_length": 96,
            "train_sampling_strategy": "sequential", "disable_tqdm": True,
        }  # fmt: skip
        arguments: dict[str, Any] = {
            "model": policy, "args": config(**(common | settings)), "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
        }  # fmt: skip
        if reference:
            arguments["ref_model"] = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        return trainer(**arguments)

    run.make_trainer = make_trainer  # type: ignore[attr-defined]
    return run


def plain_copy(model: Any) -> Any:
    """The same weights in a model without the kernel layer."""
    from trebuchet.kernels.patch import unpatch

    twin = copy.deepcopy(model)
    unpatch(twin)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin
