"""Filters, sorting, cost and lineage, over runs of the program's own writer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs as made
from trebuchet.launcher import cli, record
from trebuchet.launcher.errors import UserError
from trebuchet.launcher.listing import choose
from trebuchet.launcher.run_folder import RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", 1e-4), ("b", 1e-3), ("c", 1e-5)):
        made.write(root / name, made.planned(rate))
    return root


def listed(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(["list", str(folder), "--json", *arguments]) == 0
    return [entry["run"] for entry in json.loads(capsys.readouterr().out)]


def test_list_filters_and_sorts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(folder, capsys, "--sort", "loss")[0] == "a"
    assert listed(folder, capsys, "--sort=-loss")[-1] == "a"
    assert listed(folder, capsys, "--where", "loss<2") == ["a"]
    assert set(listed(folder, capsys, "--where", "loss>=2", "--where", "model~qwen")) == {"b", "c"}
    assert listed(folder, capsys, "--where", "state!=SUCCEEDED") == []
    assert listed(folder, capsys, "--where", "data=ab12cd", "--where", "run=b") == ["b"]
    for wrong, says in (("los<2", "did you mean 'loss'"), ("loss", "a condition is"), ("loss<x", "is a number")):
        assert cli.main(["list", str(folder), "--where", wrong]) == 2
        assert says in capsys.readouterr().err


def test_an_entry_without_a_value_is_last_and_fulfils_nothing() -> None:
    entries: list[dict[str, Any]] = [{"loss": None}, {"loss": 2.0}, {"loss": 1.0}]
    assert [e["loss"] for e in choose(entries, [], "loss")] == [1.0, 2.0, None]
    assert [e["loss"] for e in choose(entries, [], "-loss")] == [2.0, 1.0, None]
    assert [e["loss"] for e in choose(entries, ["loss!=1"], None)] == [2.0]
    with pytest.raises(UserError):
        choose(entries, [], "nothing")


def test_cost_by_run_and_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads((folder / "a" / "plan.json").read_text())
    plan["cluster"]["groups"][0]["price_per_gpu_hour"] = 0.5
    (folder / "a" / "plan.json").write_text(json.dumps(plan))
    assert cli.main(["list", str(folder), "--cost"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "SUCCEEDED", "4.00", "2.00"] in lines  # 2.5 and 1.5 hours on one GPU at 0.50
    assert lines[-1][-6:] == ["2.00", "(2", "runs", "without", "a", "price)"] and "12.00" in lines[-1]


def test_lineage_walks_back_to_rows_and_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(folder / "c")
    merge = {
        "folder": "/m",
        "base": "quantized",
        "dtype": "bf16",
        "files": {"model.safetensors": "a" * 64},
        "adapter_files": {"x": "b" * 64},
    }
    record.update(run, merge=merge, model_files={"adapter_model.safetensors": "b" * 64})
    assert cli.main(["show", str(run.root), "--lineage", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["merged"]["adapter_files"]["x"] == found["model"]["files"]["adapter_model.safetensors"]
    assert found["base"]["name"] == "Qwen/Qwen2.5-0.5B-Instruct" and found["seed"] == 0
    assert found["data"]["sources"][0]["fingerprint"] == "ab12" and found["data"]["sources"][0]["rows"] == 900
    assert cli.main(["show", str(run.root), "--lineage"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if not line.startswith(" ")] == [
        "merged",
        "model",
        "run",
        "base",
        "rows",
        "code",
    ]
