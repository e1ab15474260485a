"""The configuration in its other forms: written out and read back, as JSON schema, and as anything a user may type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher.config import build_config, dump_config, json_schema, load_config
from trebuchet.launcher.errors import ConfigError
from trebuchet.launcher.schema import TrainConfig

TWO_LINES = {"model": "org/name", "data": "train.jsonl"}
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))

# Values of every section that are valid by themselves; `dump_config` must bring each back.
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
paths = texts.filter(lambda t: t.strip() == t)
sources = st.fixed_dictionaries(
    {"path": paths},
    optional={
        "weight": st.floats(0.01, 100),
        "split": texts,
        "subset": st.none() | texts,
        "columns": st.dictionaries(texts, texts, max_size=2),
    },
)
lora = st.fixed_dictionaries(
    {"r": st.integers(1, 1024), "targets": st.just("all-linear") | st.lists(texts, max_size=3)}
)
optimization = {
    "learning_rate": st.just("auto") | st.floats(1e-12, 1),
    "warmup": st.floats(0, 0.99) | st.integers(0, 50),
    "seed": st.integers(0, 2**32 - 1),
    "max_steps": st.none() | st.integers(1, 10**6),
}
model = {"name": paths, "revision": st.none() | texts, "trust_remote_code": st.booleans()}
kernels = st.sampled_from(["on", "off", True, False, "auto"])
configs = st.fixed_dictionaries(
    {"model": paths | st.fixed_dictionaries(model), "data": paths | st.lists(sources, min_size=1, max_size=3)},
    optional={
        "output": paths,
        "strategy": st.sampled_from(["auto", "qlora"]) | st.fixed_dictionaries({"lora": lora, "kernels": kernels}),
        "optimization": st.fixed_dictionaries({}, optional=optimization),
        "tracking": st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow"]), max_size=2),
    },
)


@given(configs)
def test_the_resolved_configuration_reads_back_equal(tree: dict[str, Any]) -> None:
    config = build_config(tree)
    text = dump_config(config)
    assert build_config(yaml.safe_load(text)) == config
    assert dump_config(build_config(yaml.safe_load(text))) == text
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*TrainConfig.model_fields, "other"]), json_values, max_size=4))
def test_any_tree_is_accepted_or_refused_in_sentences(tree: dict[str, Any]) -> None:
    try:
        build_config(tree)
    except ConfigError as error:
        assert error.problems and all(p.strip() and "\n" not in p for p in error.problems)


@given(st.text(max_size=30))
def test_any_override_is_accepted_or_refused_in_sentences(override: str) -> None:
    try:
        build_config(TWO_LINES, [override])
    except ConfigError as error:
        assert error.problems


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_the_json_schema_takes_every_example(example: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    tree = json.loads(re.sub(r'"(\d+e-\d+)"', r"\1", json.dumps(yaml.safe_load(example.read_text()))))
    validator.validate(tree)  # 1e-4 is a number in YAML 1.2, which editors read, and a string to PyYAML
    validator.validate(json.loads(json.dumps(yaml.safe_load(dump_config(load_config(example))))))
    assert list(validator.iter_errors({**tree, "optimizaton": {}}))
    assert list(validator.iter_errors({**tree, "strategy": {"method": "qlra"}}))


def test_the_schema_describes_the_written_forms() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    for tree in (
        TWO_LINES,
        {
            "model": "a",
            "data": ["x", {"path": "y", "weight": 2}],
            "strategy": "lora",
            "objective": "sft",
            "cluster": "local",
        },
        {"model": "a", "data": {"train": "x", "eval": "y"}},
        {"model": "a", "data": {"train": ["x", {"path": "y"}], "eval": 0.1}},
    ):
        build_config(tree)
        validator.validate(tree)


def test_no_key_asks_for_a_secret() -> None:
    def keys(tree: Any) -> set[str]:
        if isinstance(tree, dict):
            return set(tree.get("properties", {})) | {k for value in tree.values() for k in keys(value)}
        return {k for value in tree for k in keys(value)} if isinstance(tree, list) else set()

    assert keys(json_schema()) >= {"learning_rate", "path"}
    assert not [
        k
        for k in keys(json_schema())
        if any(word in k for word in ("token", "secret", "password", "api_key")) and k != "max_new_tokens"
    ]
