"""Packed samples do not see each other: measured on every family of the table, and refused where a model's class lets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trebuchet.launcher import api, worker
from trebuchet.launcher.errors import JobFailed
from trebuchet.launcher.model_families import FAMILIES
from trebuchet.training import isolation
from trebuchet.training.scores import Subject, of_stepper
from trebuchet.training.session import Session

from ..conftest import write_jsonl
from ..strategies.experts import save

pytestmark = pytest.mark.slow


class Placed(torch.nn.Module):
    """A model of one embedding that sees no neighbour, and counts places as it is told or through the whole row."""

    def __init__(self, through: bool):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.through = torch.nn.Embedding(32, 32), torch.nn.Embedding(64, 32), through

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        at = torch.arange(input_ids.shape[1])[None] if self.through else position_ids
        return SimpleNamespace(logits=self.words(input_ids) + self.places(at))


@pytest.mark.parametrize("through", [False, True])
def test_places_that_do_not_begin_anew_are_seen_though_samples_are_apart(through: bool) -> None:
    model = Placed(through)
    seen = isolation.largest_change(Subject(model=model, inside=model, device=torch.device("cpu")), vocab=32, pad_id=0)
    assert seen > 0.1 if through else seen == 0


def change(session: Session) -> float:
    loop = session.loop(session.prepared())
    kind = session.config.objective.name
    vocab = session.plan.model.vocab_size
    return isolation.largest_change(of_stepper(loop.stepper), vocab=vocab, pad_id=0, score=kind == "reward")


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_the_table_keep_samples_apart(
    family: str, kernels: str, tiny_model: Path, session: Callable[..., Session], tmp_path: Path
) -> None:
    base = save(tmp_path / "base", family, tiny_model)
    assert change(session({"model.name": str(base), "strategy.kernels": kernels})) <= isolation.BOUND[torch.float32]


@pytest.fixture
def leaking(tiny_model: Path, tmp_path: Path) -> Path:
    """An OPT, whose class counts its positions through the whole row whatever position ids it is given (transformers 5.23)."""
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 64, "intermediate_size": 96}
    return save(tmp_path / "opt", "opt", tiny_model, **sizes)


def test_a_model_that_lets_samples_see_each_other_is_refused_until_packing_is_off(
    leaking: Path, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes = {"model.name": str(leaking), "optimization.max_steps": 1, "evaluation.generations": 0, "tracking": []}
    folder, plan = api.begin(tiny_config(changes, output=str(tmp_path / "packed")))
    folder.logs.mkdir()
    with pytest.raises(
        JobFailed, match=r"packed samples see each other in a model of type opt: .* Set data.packing false"
    ):
        worker.train(folder, plan)
    folder, plan = api.begin(tiny_config(changes | {"data.packing": False}, output=str(tmp_path / "alone")))
    folder.logs.mkdir()
    assert worker.train(folder, plan)


def test_a_reward_model_is_asked_for_its_scores(leaking: Path, session: Callable[..., Session], tmp_path: Path) -> None:
    rows = [{"prompt": f"north {i}", "chosen": " river stone", "rejected": " stone"} for i in range(16)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs = {"objective": "reward", "data.train": str(file), "data.eval": 0}
    assert change(session(pairs)) <= isolation.BOUND[torch.float32]
    assert change(session(pairs | {"model.name": str(leaking)})) > 10 * isolation.BOUND[torch.float32]
