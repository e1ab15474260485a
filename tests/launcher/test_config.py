"""The configuration: what is accepted, and what a user reads when it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli
from trebuchet.launcher.config import build_config, load_config
from trebuchet.launcher.errors import ConfigError

TWO_LINES = {"model": "org/name", "data": "train.jsonl"}


def problems(tree: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(tree, overrides)
    return list(caught.value.problems)


def in_file(tmp_path: Path, text: str) -> ConfigError:
    (tmp_path / "train.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "train.yaml")
    return caught.value


def test_two_lines_are_enough_and_the_defaults_are_the_documented_ones() -> None:
    config = build_config(TWO_LINES)
    assert config.model.name == "org/name" and [s.path for s in config.data.train] == ["train.jsonl"]
    optimization, lora = config.optimization, config.strategy.lora
    assert (optimization.global_batch_size, optimization.schedule, optimization.epochs) == (16, "cosine", 3.0)
    assert 0.03 <= optimization.warmup <= 0.1
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (16, 32, 0.0, "all-linear")
    assert (config.strategy.quant.type, config.strategy.quant.double) == ("nf4", True)
    assert config.data.train_on == "assistant" and config.data.packing and config.tracking == ("tensorboard",)
    assert not config.model.trust_remote_code


def test_all_errors_come_at_once_each_with_its_line_and_path(tmp_path: Path) -> None:
    error = in_file(
        tmp_path,
        """model: org/name
data: {train: t.jsonl, max_len: 512}
strategy:
  method: qlra
  lora: {r: 0}
optimization:
  learning_rate: fast
zzz: red
""",
    )
    text = str(error).splitlines()
    assert text[0] == f"{tmp_path / 'train.yaml'}: 5 problems:"
    assert sorted(text[1:]) == sorted(
        [
            "  line 2: data.max_len: unknown key; did you mean 'max_length'?",
            "  line 4: strategy.method: must be 'auto', 'full', 'lora' or 'qlora', not 'qlra'",
            "  line 5: strategy.lora.r: must be greater than or equal to 1, not 0",
            "  line 7: optimization.learning_rate: must be 'auto' or a number, not 'fast'",
            "  line 8: zzz: unknown key; one of: budget, checkpointing, cluster, data, evaluation, model, objective, optimization, "
            "output, strategy, sweep, tracking",
        ]
    )


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"optimisation": {}}, "optimisation: unknown key; did you mean 'optimization'?"),
        ({"strategy": {"lora": {"rank": 8}}}, "strategy.lora.rank: unknown key; one of: alpha, dropout, r, targets"),
        ({"learning_rate": 1e-4}, "learning_rate: unknown key; did you mean 'optimization.learning_rate'?"),
        (
            {"strategy": {"micro_batch": 4}},
            "strategy.micro_batch: unknown key; did you mean 'optimization.micro_batch'?",
        ),
        ({"data": {"train": [{"path": "a", "splt": "x"}]}}, "data.train.0.splt: unknown key; did you mean 'split'?"),
        ({"data": {"train": "a", "eval": [{"pth": "b"}]}}, "data.eval.0.pth: unknown key; did you mean 'path'?"),
        ({"data": {"train": "a", "eval": 1.5}}, "data.eval: must be less than 1, not 1.5"),
        ({"data": {"train": []}}, "data.train: must not be empty"),
        ({"data": {"train": ""}}, "data.train.0.path: must not be empty"),
        ({"data": {"train": "a", "max-length": 9}}, "data.max-length: unknown key; did you mean 'max_length'?"),
        ({"optimization": {"warmup": 2.5}}, "optimization: warmup is a share below 1 or a whole number of steps"),
        ({"optimization": {"learning_rate": float("nan")}}, "optimization.learning_rate: "),
        ({"tracking": ["tensorbord"]}, "tracking.0: "),
        ({"tracking": "tensorboard"}, "tracking: must be a list"),
        ({"output": 7}, "output: must be a string, not 7"),
        ({"model": None}, "model: missing"),
        ({"model": ["a"]}, "model.name: must be a string"),
        ({"optimization": 5}, "optimization: must be keys and values, not 5"),
        ({"strategy": {"kernels": "maybe"}}, "strategy.kernels: must be 'auto', 'on' or 'off', not 'maybe'"),
    ],
)
def test_one_mistake_one_sentence(tree: dict[str, Any], expected: str) -> None:
    found = [p for p in problems({**TWO_LINES, **tree}) if not p.endswith(": missing") or expected.endswith("missing")]
    assert any(p.startswith(expected) for p in found), found
    assert all(len(p) < 400 and "\n" not in p for p in found)


def test_missing_sections_are_named() -> None:
    assert problems({}) == ["model: missing", "data: missing"]


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    """A heading whose keys are all commented out."""
    (tmp_path / "t.yaml").write_text("model: a\ndata: b\nevaluation:\n  # every: 1\ntracking:\n")
    assert load_config(tmp_path / "t.yaml") == build_config({"model": "a", "data": "b", "output": "runs/t"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: a\ndata: b\nmodel: c\n", "line 3: model: written twice"),
        ("model: a\ndata: {train: b, packing: on, packing: off}\n", "line 2: data.packing: written twice"),
        ("model: a\n data: b\n", "line 2: not valid YAML"),
        ("model: a\n\tdata: b\n", "line 2: not valid YAML"),
        ("- model\n", "the file must hold keys and values"),
        ("", "the file must hold keys and values"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    assert in_file(tmp_path, text).problems[0].startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    for name, reason in (("absent.yaml", "No such file"), (".", "directory"), ("latin.yaml", "not UTF-8 text")):
        assert cli.main(["plan", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1


def test_numbers_and_words_as_yaml_reads_them() -> None:
    config = build_config(
        yaml.safe_load("model: a\ndata: b\noptimization: {learning_rate: 1e-4}\nstrategy: {kernels: off}")
    )
    assert config.optimization.learning_rate == 1e-4  # PyYAML takes 1e-4 for a string
    assert config.strategy.kernels == "off"  # and off for False
    assert build_config({**TWO_LINES, "strategy": {"kernels": True}}).strategy.kernels == "on"


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("model=other/name", "model.name", "other/name"),
        ("model.dtype=fp32", "model.dtype", "fp32"),
        ("strategy=qlora", "strategy.method", "qlora"),
        ("strategy.lora.r=64", "strategy.lora.r", 64),
        ("strategy.lora.targets=[q_proj, v_proj]", "strategy.lora.targets", ("q_proj", "v_proj")),
        ("optimization.learning_rate=1e-4", "optimization.learning_rate", 1e-4),
        ("optimization.max_steps=7", "optimization.max_steps", 7),
        ("optimization.max_steps=null", "optimization.max_steps", None),
        ("strategy.kernels=off", "strategy.kernels", "off"),
        ("data=x=y.jsonl", "data.train.0.path", "x=y.jsonl"),
        ("data.train=a b.jsonl", "data.train.0.path", "a b.jsonl"),
        ("data.train.0.weight=0.5", "data.train.0.weight", 0.5),
        ("data.train.0.columns.prompt=q=a", "data.train.0.columns.prompt", "q=a"),
        ("data.eval=0", "data.eval", 0.0),
        ("data.eval=held.jsonl", "data.eval.0.path", "held.jsonl"),
        ("tracking=[]", "tracking", ()),
        ("output=runs/é'x", "output", "runs/é'x"),
        ("cluster=a100-80gb-8", "cluster.name", "a100-80gb-8"),
    ],
)
def test_set_changes_one_key(override: str, where: str, value: Any) -> None:
    here: Any = build_config(TWO_LINES, [override])
    for name in where.split("."):
        here = here[int(name)] if name.isdigit() else here[name] if isinstance(here, dict) else getattr(here, name)
    assert here == value


def test_overrides_apply_in_order_and_leave_the_rest() -> None:
    tree = {**TWO_LINES, "strategy": {"lora": {"r": 8}}}
    config = build_config(
        tree,
        [
            "strategy.lora.alpha=64",
            "data.train=[x.jsonl, y.jsonl]",
            "data.train.1.weight=2",
            "model=z",
            "model.dtype=fp16",
        ],
    )
    assert (config.strategy.lora.r, config.strategy.lora.alpha) == (8, 64)
    assert [(s.path, s.weight) for s in config.data.train] == [("x.jsonl", 1.0), ("y.jsonl", 2.0)]
    assert (config.model.name, config.model.dtype) == ("z", "fp16")
    assert tree == {**TWO_LINES, "strategy": {"lora": {"r": 8}}}


@pytest.mark.parametrize(
    "override", ["strategy", "=1", "strategy.=1", "a b=1", "model.name.x=1", "data.train.9.path=a", "data.train.x=a"]
)
def test_set_that_cannot_be_applied(override: str) -> None:
    (problem,) = problems(TWO_LINES, override)
    assert problem.startswith("--set")


def test_set_with_an_unknown_key_is_the_same_error_as_in_the_file() -> None:
    assert problems(TWO_LINES, "optimization.lr=1e-4") == problems({**TWO_LINES, "optimization": {"lr": 1e-4}})
