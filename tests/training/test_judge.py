"""Scores, verdicts, forgetting and early stopping, against plain transformers in float64 and against runs that must come out so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from trebuchet.launcher import api, cli, record, worker
from trebuchet.launcher.errors import DataError, JobFailed, UserError
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.training import forgetting, metrics, verdict
from trebuchet.training.scores import Subject


@pytest.fixture
def train(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., tuple[RunFolder, str | None]]:
    """A run in this process: its folder, and the paragraph it failed with."""

    def go(changes: dict[str, Any]) -> tuple[RunFolder, str | None]:
        output = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        folder, plan = api.begin(tiny_config({"tracking": [], "evaluation.forgetting": 8, **changes}, output=output))
        folder.logs.mkdir()
        try:
            assert worker.train(folder, plan)
        except JobFailed as error:
            return folder, str(error)
        return folder, None

    return go


@pytest.mark.slow
def test_a_run_is_called_better_and_its_rows_are_those_of_transformers(
    train: Callable[..., tuple[RunFolder, str | None]], by_template: Callable[[Path], Any], held_out_file: Path
) -> None:
    folder, failed = train({"evaluation.metrics": ["exact_match"], "evaluation.generations": 4})
    assert failed is None
    found = record.read(folder)["evaluation"]
    assert found["verdict"] == "better" and found["compared"]["loss"]["high"] < 0
    assert found["forgetting"]["kl_nats"] > 0 and found["forgetting"]["prompts"] == 8
    assert set(found["compared"]) == {"loss", "accuracy", "bits_per_byte", "exact_match"}
    rows = json.loads(folder.evaluation.read_text())["after"]["rows"]
    model = AutoModelForCausalLM.from_pretrained(folder.model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    for sample, (ids, first, end) in enumerate(by_template(held_out_file)):
        at = rows["sample"].index(sample)
        with torch.no_grad():
            logits = model(ids).logits[0, first - 1 : end - 1]
        labels = ids[0, first:end]
        assert rows["loss"][at] == pytest.approx(
            float(-logits.log_softmax(-1).gather(1, labels[:, None]).sum()), rel=1e-5
        )
        assert rows["tokens"][at] == end - first and rows["correct"][at] == int((logits.argmax(-1) == labels).sum())
        assert rows["bytes"][at] == len(tokenizer.decode(labels, skip_special_tokens=True).encode())
    memory = record.read(folder)["measured_memory"]
    if memory["by_phase"]:
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        largest = max(line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line) / 2**30
        assert list(memory["phases_gib"]) == ["load", "forward_backward", "optimizer_step", "checkpoint_save"]
        assert all(0 < memory["before_gib"] - 0.2 <= peak <= largest + 0.1 for peak in memory["phases_gib"].values())
    after = found["after"]
    assert after["accuracy"] == sum(rows["correct"]) / sum(rows["tokens"])
    assert after["bits_per_byte"] == pytest.approx(sum(rows["loss"]) / np.log(2) / sum(rows["bytes"]))
    # The page of a run that trained, not of a written record: before and after, and every phase of memory where it is told.
    assert cli.main(["report", str(folder.root)]) == 0
    page = (folder.root / "report.html").read_text()
    assert f"from {found['before']['loss']:.3f}" in page and f"<strong>{found['after']['loss']:.3f}" in page
    assert ('id="plot-phases"' in page) == memory["by_phase"]
    # The same run, whole and for others: plain transformers opens it, and its card says what was found.
    assert cli.main(["export", str(folder.root), "--format", "hf"]) == 0
    exported = folder.exports / "hf"
    again = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64)
    assert torch.equal(again(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
    card = (exported / "README.md").read_text()
    assert f"{after['loss']:.4f}" in card and "base_model" not in card and str(folder.root) not in card
    assert record.read(folder)["exports"]["hf"]["files"] == record.read(folder)["model_files"]
    assert cli.main(["export", str(folder.root), "--format", "adapter"]) == 2


@pytest.mark.slow
def test_a_wrecked_learning_rate_is_called_worse_and_trips_the_threshold(
    train: Callable[..., tuple[RunFolder, str | None]],
) -> None:
    changes = {"optimization.learning_rate": 0.3, "optimization.max_steps": 10, "optimization.max_grad_norm": 0}
    folder, failed = train({**changes, "evaluation.max_forgetting": 0.5, "evaluation.every": 100})
    found = record.read(folder)["evaluation"]
    assert found["verdict"] == "worse" and found["compared"]["loss"]["low"] > 0
    assert failed and "evaluation.max_forgetting allows 0.5" in failed
    assert all(advice in failed for advice in ("Lower the learning rate", "train fewer epochs", "mix general data"))
    assert found["forgetting"]["kl_nats"] > 0.5
    assert (folder.model / "config.json").exists()  # what was trained is kept: it was paid for


@pytest.mark.slow
def test_a_rate_of_nearly_nothing_is_not_distinguishable(train: Callable[..., tuple[RunFolder, str | None]]) -> None:
    changes = {"optimization.learning_rate": 1e-9, "optimization.max_steps": 2, "optimization.weight_decay": 0}
    folder, failed = train({**changes, "evaluation.max_forgetting": 0.01})
    found = record.read(folder)["evaluation"]
    assert failed is None and abs(found["forgetting"]["kl_nats"]) < 1e-3
    assert found["compared"]["accuracy"]["verdict"] == "not distinguishable"


@pytest.mark.slow
def test_training_stops_early_and_the_best_weights_become_the_model(
    train: Callable[..., tuple[RunFolder, str | None]],
) -> None:
    """The rate rises past what the model can take, so the held-out loss turns and an early checkpoint is the best."""
    changes = {"optimization.learning_rate": 0.02, "optimization.warmup": 40, "optimization.max_grad_norm": 0}
    settings = {"evaluation.best": "loss", "evaluation.stop_after": 2, "evaluation.every": 2, "checkpointing.keep": 1}
    folder, failed = train({**changes, **settings, "evaluation.forgetting": 0})
    assert failed is None
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    found = record.read(folder)
    best = min(losses, key=losses.__getitem__)
    assert found["best"]["step"] == best < found["step"] < 40 and "2 evaluations without" in found["stopped_early"]
    assert list(losses)[-3:] == [best, best + 2, best + 4]
    assert found["evaluation"]["after"]["loss"] == losses[best]


@pytest.mark.parametrize("best", ["kl", "general", "letters"])
@pytest.mark.slow
def test_the_best_weights_by_what_was_forgotten_or_by_a_metric_of_answers(
    train: Callable[..., tuple[RunFolder, str | None]], tmp_path: Path, best: str
) -> None:
    """By the divergence from the base the first weights are the best, since it only grows; then the run is stopped early too."""
    (tmp_path / "mine.py").write_text(
        "import zlib\ndef letters(answer, reference):\n    return zlib.crc32(answer.encode()) % 1000 / 1000\n"
    )
    name = f"{tmp_path}/mine.py:letters" if best == "letters" else best
    changes = {"optimization.max_steps": 24, "optimization.learning_rate": 1e-2, "evaluation.every": 6}
    changes |= {"evaluation.metrics": [f"{tmp_path}/mine.py:letters"], "evaluation.generations": 4}
    changes["evaluation.stop_after"] = 2 if best == "kl" else None
    folder, failed = train({**changes, "evaluation.best": name, "checkpointing.keep": 1})
    assert failed is None
    key = {"kl": "kl_nats", "general": "general_loss"}.get(best, "eval_letters")
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    seen = {line["step"]: line[key] for line in lines if key in line}
    assert list(seen) == ([6, 12, 18] if best == "kl" else [6, 12, 18, 24]) and len(set(seen.values())) > 1
    assert ("2 evaluations without" in (record.read(folder).get("stopped_early") or "")) == (best == "kl")
    assert best == "letters" or all("kl_nats" in line for line in lines if "eval_loss" in line)
    chosen = record.read(folder)["best"]["step"]
    assert seen[chosen] == (max if best == "letters" else min)(seen.values())
    after = json.loads(folder.evaluation.read_text())
    now = {
        "kl": after["forgetting"]["kl_nats"],
        "general": after["forgetting"]["general"]["after"],
        "letters": np.mean(metrics.values(changes["evaluation.metrics"][0], after["after"]["answers"], [""] * 4)),
    }
    assert now[best] == pytest.approx(seen[chosen], rel=1e-6)  # the model that was kept is the one that had that figure


def test_a_best_figure_that_there_is_not_is_refused(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for changes, says in (
        ({"evaluation.best": "margin"}, "no figure of the objective sft"),
        ({"evaluation.best": "rouge"}, "not among metrics"),
        ({"evaluation.best": "json", "evaluation.metrics": ["json"], "evaluation.generations": 0}, "generations is 0"),
        ({"evaluation.best": "general", "evaluation.forgetting": 1}, "two general prompts"),
    ):
        with pytest.raises(UserError, match=says):
            api.begin(tiny_config(changes, output=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_estimate_of_kl_is_the_exact_one(tiny_model: Path) -> None:
    """Over many sampled answers it comes near the sum over the vocabulary, position by position."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for parameter in tuned.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    subjects = [Subject(model=m, inside=m, device=torch.device("cpu")) for m in (base, tuned)]
    prompts = [f"question {i}" for i in range(60)]
    state = torch.random.get_rng_state()
    said = forgetting.ask_base(subjects[0], tokenizer, prompts, 0)
    assert torch.equal(torch.random.get_rng_state(), state)  # training goes on as if nothing had been asked
    assert said[:10] == forgetting.ask_base(subjects[0], tokenizer, prompts[:10], 0)
    before, after = (forgetting.measure(s, tokenizer, said, [], 0) for s in subjects)
    general = {"loss": [], "tokens": []}
    found = forgetting.compare({**before, "general": general}, {**after, "general": general})
    exact, count = 0.0, 0
    for row in said:
        ids = torch.tensor([[*row["prompt"], *row["answer"]]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(row["prompt"]) - 1 : -1].log_softmax(-1) for m in (base, tuned))
        exact += float((p.exp() * (p - q)).sum())
        count += len(row["answer"])
    assert found["kl_low"] <= exact / count <= found["kl_high"] and exact / count > 0.01


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.integers(1, 50)), min_size=2, max_size=40),
    st.booleans(),
)
def test_a_verdict_agrees_with_its_interval(rows: list[tuple[float, float, int]], lower: bool) -> None:
    before, after, weights = (list(column) for column in zip(*rows, strict=True))
    found = verdict.ratio(before, after, weights, lower_is_better=lower)
    assert found["low"] <= found["high"]
    if found["verdict"] == verdict.SAME:
        assert found["low"] <= 0 <= found["high"]
    else:
        assert (found["high"] < 0 or found["low"] > 0) and (found["verdict"] == verdict.BETTER) == (
            (found["high"] < 0) == lower
        )
    back = verdict.ratio(after, before, weights, lower_is_better=lower)
    assert back["difference"] == pytest.approx(-found["difference"], abs=1e-12)
    assert (back["low"], back["high"]) == pytest.approx((-found["high"], -found["low"]), abs=1e-9)


@pytest.mark.slow
def test_the_interval_covers_as_often_as_it_says() -> None:
    """400 pairs of equal models on 60 rows each: about 5 % are called different by chance."""
    random = np.random.default_rng(0)
    called = 0
    for _ in range(400):
        before = random.gamma(2.0, size=60)
        after = before + random.normal(0, 0.3, size=60)
        called += verdict.ratio(before, after, [1] * 60, lower_is_better=True)["verdict"] != verdict.SAME
    assert 5 <= called <= 40  # binomial(400, 0.05) is 20 +- 4.4; the percentile interval is a little short on 60 rows


def test_metrics(tmp_path: Path) -> None:
    assert metrics.values("exact_match", ["a  b", "a c"], ["a b", "a b"]) == [1.0, 0.0]
    code = ["```python\nx = 1\n```", "Sure:\n```\nx = \n```", "y = 2", ""]
    assert metrics.values("compiles", code, [""] * 4) == [1.0, 0.0, 1.0, 0.0]
    answers = ['{"a": 1}', '{"b": 1}', "[1, 2", '```json\n{"a": 2, "b": 3}\n```']
    assert metrics.values("json", answers, ['{"a": 0}'] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert metrics.values("rouge", ["the cat sat"], ["the cat sat down"])[0] == pytest.approx(
        6 / 7
    )  # LCS 3 of 3 and of 4
    (tmp_path / "mine.py").write_text("def half(answer, reference):\n    return 0.5\ndef bad(a, r):\n    return 7\n")
    assert metrics.values(f"{tmp_path}/mine.py:half", ["x"], ["y"]) == [0.5]
    for name, says in (
        (f"{tmp_path}/mine.py:bad", "from 0 to 1"),
        ("exact", "did you mean 'exact_match'"),
        ("no.py:f", "does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            metrics.values(name, ["x"], ["y"])


def test_general_rows_are_checked(tmp_path: Path) -> None:
    assert len(forgetting.read(None)) >= 20
    (tmp_path / "g.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"g.jsonl:2"):
        forgetting.read(str(tmp_path / "g.jsonl"))


def test_a_metric_that_does_not_exist_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    for changes in ({"evaluation.metrics": ["rogue"]}, {"evaluation.general": "nowhere.jsonl"}):
        with pytest.raises(UserError, match=r"did you mean 'rouge'|does not exist"):
            api.begin(tiny_config(changes, output=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())
