"""Curation by the scores of a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher.errors import UserError

from .test_curate import ALONE, Call, decide, dropped, talk

__all__ = ["decide"]  # the fixture


def test_a_reward_model_keeps_the_best_and_says_the_scores(chatml: Any, decide: Call, tmp_path: Path) -> None:
    """A tiny score model; its scores are taken one by one by hand, and two of four rows stay."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chatml), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, num_labels=1, pad_token_id=chatml.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "reward")
    chatml.save_pretrained(tmp_path / "reward")
    rows = [
        talk(answer, f"Question {i}") for i, answer in enumerate(("Yes.", "No, not at all.", "Perhaps so", "Never."))
    ]
    with torch.no_grad():
        ids = [chatml.apply_chat_template(row["messages"], return_dict=False) for row in rows]
        scores = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    best = sorted(sorted(range(4), key=lambda i: scores[i])[2:])
    wanted = {"model": str(tmp_path / "reward"), "batch": 3}
    decision = decide(rows, ALONE | {"reward": wanted | {"keep": 0.5}})
    assert decision.train[0].tolist() == best
    for line in dropped(decision):
        place = int(line["row"].rsplit(" ", 1)[1]) - 1
        assert (
            line["step"] == "reward" and abs(line["score"] - scores[place]) < 1e-3
        )  # four decimals, and padding in the batch
    middle = sum(sorted(scores)[1:3]) / 2
    assert decide(rows, ALONE | {"reward": wanted | {"at_least": middle}}).train[0].tolist() == best
    with pytest.raises(UserError, match=r"data\.curate\.reward: .*no-such"):
        decide(rows, ALONE | {"reward": {"model": str(tmp_path / "no-such"), "keep": 0.5}})
