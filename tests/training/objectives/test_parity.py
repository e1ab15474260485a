"""Loss and gradient of each objective beside TRL's trainer: same weights, same rows, fp32, and a policy that has moved.

Rows are plain text, where both tokenize alike: prompt and answer as one text, EOS behind, padding on the right, loss from
the first token that the prompt alone has not. What differs on purpose stands in the tests below.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trebuchet.training.objectives import losses
from trebuchet.training.objectives.base import token_logps

from ...conftest import write_jsonl
from .conftest import answers, gradient, in_file_order, judged, pairs, plain_copy, texts

# fp32: both sum a few hundred log-probabilities through two layers in different orders.
LOSS, GRADIENT = 1e-5, 1e-5


def ours(loop: Any, batch: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step over every row, in the file's order, before the optimizer moves anything."""
    seen: dict[str, torch.Tensor] = {}
    model = loop.stepper.model_inside()
    hook = loop.stepper.optimizer.register_step_pre_hook(lambda *_: seen.update(gradient(model)))
    if batch is None:
        batch = loop.stepper.objective.collate(loop.units, in_file_order(loop), **LAYOUT)
    result = loop.stepper.step([batch])
    hook.remove()
    return result.loss, seen


LAYOUT: dict[str, Any] = {"packing": False, "pad_id": 0, "width": None}


def same(mine: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]]) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=LOSS)
    assert mine[1].keys() == theirs[1].keys()
    names = sorted(mine[1])
    a, b = (torch.cat([g[n].flatten() for n in names]).double() for g in (mine[1], theirs[1]))
    assert b.norm() > 1e-3
    assert (a - b).norm() <= GRADIENT * b.norm()


def likelier(loop: Any) -> None:
    """Moves the policy so that answers to other prompts gain: noise alone makes them less likely."""
    batch = loop.stepper.objective.collate(loop.units, in_file_order(loop), **LAYOUT)["mismatched"]
    parameters = list(loop.stepper.model_inside().parameters())
    for _ in range(10):
        loss = -token_logps(loop.stepper.model, batch, kernels=True).mean()
        with torch.no_grad():
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.5 * slope


@pytest.mark.parametrize("name", ["sft", "pretrain"])
@pytest.mark.parametrize("packing", [False, True])
def test_sft(compare: Callable[..., Any], trl: Callable[..., Any], name: str, packing: bool) -> None:
    """Answers to prompts, and plain texts of which every token carries loss; packed, both sides' documents see only themselves."""
    from trl import SFTConfig, SFTTrainer

    loop = compare({"name": name}, {"data.packing": packing})
    policy = plain_copy(loop.stepper.model_inside())
    rows = answers() if name == "sft" else texts()
    theirs = trl(SFTTrainer, SFTConfig, policy, rows, reference=False, packing=packing)
    if not packing:
        same(ours(loop), theirs)
        return
    assert len(loop.rows) < len(rows)
    batch = loop.stepper.objective.collate(loop.units, loop.rows, **(LAYOUT | {"packing": True}))
    same(ours(loop, batch), theirs)


@pytest.fixture
def begins_with_bos(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that puts BOS before every text by itself and says that it pads on the left."""
    import shutil

    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = tmp_path / "with bos"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.padding_side = "<|im_start|>", "left"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "dpo", "orpo"])
def test_bos_and_the_side_of_padding(
    compare: Callable[..., Any], trl: Callable[..., Any], name: str, begins_with_bos: Path
) -> None:
    """One BOS before prompt and answer, EOS behind, padding on the right whatever the tokenizer says."""
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kinds: dict[str, Any] = {
        "sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig),
    }  # fmt: skip
    trainer, config = kinds[name]
    loop = compare({"name": name}, {"model.name": str(begins_with_bos)})
    policy = plain_copy(loop.stepper.model_inside())
    ids, bos = loop.units.documents(0)[0][0].tolist(), AutoTokenizer.from_pretrained(begins_with_bos).bos_token_id
    assert ids[0] == bos and ids.count(bos) == 1
    rows = answers() if name == "sft" else pairs()
    same(ours(loop), trl(trainer, config, policy, rows, reference=name == "dpo", folder=begins_with_bos))


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_dpo(compare: Callable[..., Any], trl: Callable[..., Any], loss: str, kernels: str) -> None:
    from trl import DPOConfig, DPOTrainer

    loop = compare({"name": "dpo", "loss": loss, "beta": 0.2}, {"strategy.kernels": kernels})
    policy = plain_copy(loop.stepper.model_inside())
    same(ours(loop), trl(DPOTrainer, DPOConfig, policy, pairs(), reference=True, loss_type=[loss], beta=0.2))


def test_kto(compare: Callable[..., Any], trl: Callable[..., Any]) -> None:
    """With the whole set in one micro-batch TRL pairs each prompt with the answer before it, as we always do."""
    from trl import KTOConfig, KTOTrainer

    objective = {"name": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    loop = compare(objective)
    likelier(loop)
    policy = plain_copy(loop.stepper.model_inside())
    settings = {key: value for key, value in objective.items() if key != "name"}
    batch = loop.stepper.with_divergence([loop.stepper.objective.collate(loop.units, in_file_order(loop), **LAYOUT)])
    assert float(next(iter(batch))["divergence"]) > 0.01  # or it would be clamped, and hide a wrong estimate
    same(ours(loop), trl(KTOTrainer, KTOConfig, policy, judged(), reference=True, **settings))


def test_orpo(compare: Callable[..., Any], trl: Callable[..., Any]) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    loop = compare({"name": "orpo", "beta": 0.3})
    policy = plain_copy(loop.stepper.model_inside())
    same(ours(loop), trl(ORPOTrainer, ORPOConfig, policy, pairs(), reference=False, beta=0.3))


@pytest.mark.parametrize(
    ("objective", "theirs"),
    [
        ({"name": "cpo", "label_smoothing": 0.1}, {"loss_type": "sigmoid", "label_smoothing": 0.1}),
        ({"name": "cpo", "loss": "hinge", "sft_weight": 0.5}, {"loss_type": "hinge", "cpo_alpha": 0.5}),
        ({"name": "cpo", "loss": "ipo", "beta": 0.3}, {"loss_type": "ipo", "beta": 0.3}),
        # TRL's SimPO keeps CPO's loss on the chosen answer unless told otherwise.
        (
            {"name": "simpo", "beta": 2.0, "gamma": 0.8},
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
        ),
    ],
    ids=["sigmoid", "hinge", "ipo", "simpo"],
)
def test_cpo_and_simpo(
    compare: Callable[..., Any], trl: Callable[..., Any], objective: dict[str, Any], theirs: dict[str, Any]
) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    loop = compare(objective)
    policy = plain_copy(loop.stepper.model_inside())
    same(ours(loop), trl(CPOTrainer, CPOConfig, policy, pairs(), reference=False, **theirs))


@pytest.mark.parametrize("center", [0.0, 0.05])
def test_reward(compare: Callable[..., Any], trl: Callable[..., Any], center: float) -> None:
    from trl import RewardConfig, RewardTrainer

    loop = compare({"name": "reward", "center": center})
    policy = plain_copy(loop.stepper.model_inside())
    del policy.forward  # transformers' own, which looks for the last token itself
    settings = {"center_rewards_coefficient": center or None}
    same(ours(loop), trl(RewardTrainer, RewardConfig, policy, pairs(), reference=False, **settings))


def test_what_is_cut_and_dropped_is_the_same(compare: Callable[..., Any], trl: Callable[..., Any]) -> None:
    """`max_length` that cuts most answers and leaves nothing of some: TRL's keep_start."""
    from trl import DPOConfig, DPOTrainer

    limit = 12
    rows = {"optimization.global_batch_size": 11}  # what is left of them is one batch
    loop = compare({"name": "dpo"}, {"data.max_length": limit, "data.max_truncated": 1.0, **rows})
    policy = plain_copy(loop.stepper.model_inside())
    trainer = trl.make_trainer(DPOTrainer, DPOConfig, policy, pairs(), reference=True, max_length=limit)  # type: ignore[attr-defined]
    assert 0 < len(loop.units) == len(trainer.train_dataset) < len(pairs())
    same(ours(loop), trl(DPOTrainer, DPOConfig, policy, pairs(), reference=True, max_length=limit))


def test_label_smoothing_of_dpo_is_what_the_name_says(compare: Callable[..., Any], trl: Callable[..., Any]) -> None:
    """A difference on purpose: TRL 1.16's sigmoid loss ignores label_smoothing; ours is the conservative DPO."""
    from trl import DPOConfig, DPOTrainer

    loop = compare({"name": "dpo", "label_smoothing": 0.3})
    policy = plain_copy(loop.stepper.model_inside())
    settings = {"reference": True, "loss_type": ["sigmoid"]}
    ignored, _ = trl(DPOTrainer, DPOConfig, policy, pairs(), label_smoothing=0.3, **settings)
    plain, _ = trl(DPOTrainer, DPOConfig, plain_copy(policy), pairs(), label_smoothing=0.0, **settings)
    assert ignored == plain
    d = torch.linspace(-30, 30, 13, dtype=torch.float64)
    s = torch.sigmoid(0.1 * d)
    wanted = -0.7 * torch.log(s) - 0.3 * torch.log(1 - s)
    assert torch.allclose(losses.preference("sigmoid", d, 0.1, 0.3), wanted, rtol=1e-12)
    assert ours(loop)[0] > plain


LOGGED = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_thirty_steps_follow_trls_loss_curve(compare: Callable[..., Any], trl: Callable[..., Any], name: str) -> None:
    """AdamW at a constant rate over the rows in their order, ten times over; kto with all of them in each batch."""
    import trl as theirs

    rows, size = (judged(), len(judged())) if name == "kto" else (answers() if name == "sft" else pairs(), 4)
    rate = {"optimization.learning_rate": 1e-3, "optimization.schedule": "constant", "optimization.warmup": 0}
    loop = compare({"name": name}, {**rate, "optimization.weight_decay": 0, "optimization.max_steps": 30}, moved=False)
    policy = plain_copy(loop.stepper.model_inside())
    order = in_file_order(loop)
    mine = []
    for step in range(30):
        start = step * size % len(rows)
        batch = loop.stepper.objective.collate(loop.units, order[start : start + size], **LAYOUT)
        mine.append(loop.stepper.step([batch]))
    trainer = trl.make_trainer(  # type: ignore[attr-defined]
        getattr(theirs, f"{name.upper()}Trainer"), getattr(theirs, f"{name.upper()}Config"), policy, rows, reference=name != "sft",
        per_device_train_batch_size=size, max_steps=30, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=0.0, logging_steps=1, save_strategy="no", optim="adamw_torch",
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 30 and logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    # Adam divides by the root of small moments, so rounding grows from step to step; TRL logs four digits.
    assert [step.loss for step in mine] == pytest.approx([entry["loss"] for entry in logged], rel=5e-3, abs=2e-4)
    for ours, its in LOGGED.items():
        if its in logged[-1]:  # before the first step no side is ahead: half right to us, wrong to TRL
            found = [step.figures[ours] for step in mine[1:]]
            assert found == pytest.approx([entry[its] for entry in logged[1:]], rel=1e-2, abs=2e-3), ours
            assert abs(found[-1]) > 0.01
    assert (name == "sft") == ("rewards/margins" not in logged[-1])


def test_chat_rows_differ_by_what_stands_behind_the_end(
    compare: Callable[..., Any], trl: Callable[..., Any], tmp_path: Path
) -> None:
    """A difference on purpose: TRL compares ChatML's newline behind the end token too; a model never has to write it."""
    from trl import DPOConfig, DPOTrainer

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"].strip()),
            "rejected": turn("assistant", row["rejected"].strip()),
        }
        for row in pairs()
    ]
    loop = compare({"name": "dpo"}, {"data.train": str(write_jsonl(tmp_path / "chats.jsonl", rows))})
    policy = plain_copy(loop.stepper.model_inside())
    trainer = trl.make_trainer(DPOTrainer, DPOConfig, policy, rows, reference=True)  # type: ignore[attr-defined]
    newline = trainer.processing_class("\n").input_ids
    for i, theirs in enumerate(trainer.train_dataset):
        for side, name in zip(loop.units.documents(i), ("chosen", "rejected"), strict=True):
            ids, mask = side
            assert ids.tolist() == theirs["prompt_ids"] + theirs[f"{name}_ids"]
            assert ids[mask == 1].tolist() + newline == theirs[f"{name}_ids"]
