"""What is wrong with the input is said in one paragraph, with its exit code, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def refused(
    tmp_path: Path,
    tiny_config: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Runs a verb on the tiny configuration with changes; the paragraph, checked to be one and all there is."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(changes: dict[str, Any] | None = None, *arguments: str, code: int = 2, verb: str = "run") -> str:
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tiny_config(changes or {})), encoding="utf-8")
        before = sorted(here.rglob("*"))
        assert cli.main([verb, str(tmp_path / "bad.yaml"), *arguments]) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("trebuchet: ") and err.endswith("\n")
        assert err.count("\n") == 1 and 40 < len(err) < 700 and "Traceback" not in err, err
        assert sorted(here.rglob("*")) == before, "something was written"
        return err

    return run


def chat(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "word"} for role in roles]}


def test_a_model_that_is_not_there_and_no_network(refused: Callable[..., str]) -> None:
    assert "nobody/nothing-7b" in refused({"model.name": "nobody/nothing-7b"})
    assert "there is no folder ./modle" in refused({"model.name": "./modle"})
    known = refused({"model.name": "Qwen/Qwen2.5-0.5B-Instruct"})  # its sizes are known, its weights are not here
    assert "hf download Qwen/Qwen2.5-0.5B-Instruct" in known


def test_a_model_folder_without_weights_or_tokenizer(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    for missing, words in (("model.safetensors", "no .safetensors file"), ("tokenizer.json", "tokenizer in")):
        broken = tmp_path / missing
        shutil.copytree(tiny_model, broken)
        (broken / missing).unlink()
        assert words in refused({"model.name": str(broken)})


def test_missing_and_empty_data(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "absent.jsonl" in refused({"data.train": "./absent.jsonl"})
    assert "empty.jsonl" in refused({"data.train": str(chat(tmp_path / "empty.jsonl", []))})


def test_a_broken_row_is_named_by_its_line(refused: Callable[..., str], tmp_path: Path) -> None:
    rows: list[Any] = [turns("user", "assistant") for _ in range(30)]
    rows[16] = '{"messages": [{"role": "user", "content": \n'
    said = refused({"data.train": str(chat(tmp_path / "broken.jsonl", rows))})
    assert "broken.jsonl" in said and "line 17" in said


def test_a_template_that_fails_on_a_role(refused: Callable[..., str], tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}"
        "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    data = chat(tmp_path / "tool.jsonl", [turns("user", "assistant"), turns("system", "user", "assistant")])
    said = refused({"data.train": str(data), "data.chat_template": str(template)})
    assert "tool.jsonl" in said and "no role system" in said


def test_rows_longer_than_the_model(refused: Callable[..., str]) -> None:
    said = refused({"data.max_length": 512})
    assert "512" in said and "256" in said  # both numbers


def test_an_output_folder_that_is_taken(refused: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "here" / "runs" / "other"
    other.mkdir(parents=True)
    (other / "run.json").write_text("{}")
    assert "holds another run" in refused({}, "--set", f"output={other}")
    (other / "run.json").rename(other / "notes.txt")
    assert "is not an empty folder" in refused({}, "--set", f"output={other}")
    assert "is not an empty folder" in refused({}, "--set", f"output={other / 'notes.txt'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot write in" in refused({}, "--set", f"output={locked / 'run'}")


def test_no_disk_space(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 1000, 1000))
    said = refused()
    assert "0.0 GiB free" in said and "checkpointing.keep=1" in said


def test_a_tracker_that_is_not_installed(refused: Callable[..., str]) -> None:
    """accelerate would leave it out without a word."""
    assert "swanlab is not installed" in refused({"tracking": ["swanlab"]})


def test_clusters_that_are_not_there(refused: Callable[..., str]) -> None:
    assert "did you mean 'a100-80gb-8'?" in refused({}, "--cluster", "a100-80-8", verb="plan")
    assert "nowhere.yaml" in refused({}, "--cluster", "./nowhere.yaml", verb="plan")


def test_lora_targets_that_no_layer_has(refused: Callable[..., str]) -> None:
    said = refused({"strategy.method": "lora", "strategy.lora": {"targets": ["q_prj"]}})
    assert "q_prj" in said and "q_proj" in said


def test_runs_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("status", "logs", "cancel", "resume"):
        assert cli.main([verb, str(tmp_path)]) == 2
        assert "is not a run" in capsys.readouterr().err
    assert cli.main(["list", str(tmp_path / "absent")]) == 2
    assert cli.main(["list", str(tmp_path)]) == 0
    (tmp_path / "run.json").write_text('{"run": ')
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_nothing_fits_is_exit_3_and_json_is_still_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_config: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "big.yaml").write_text("model: meta-llama/Llama-3.1-405B\ndata: train.jsonl\n")
    for verb in ("plan", "submit"):
        assert cli.main([verb, str(tmp_path / "big.yaml"), "--cluster", "rtx4090-2x24gb", "--json"]) == 3
        found = json.loads(capsys.readouterr().out)
        assert found["feasible"] is False and found["chosen"] is None and found["rejected"]
    assert cli.main(["plan", str(tmp_path / "big.yaml"), "--cluster", "rtx4090-2x24gb"]) == 3
    assert "Nothing fits." in capsys.readouterr().out


def test_a_traceback_only_with_debug(tmp_path: Path) -> None:
    from trebuchet.launcher.errors import ConfigError

    with pytest.raises(ConfigError):
        cli.main(["plan", str(tmp_path / "absent.yaml"), "--debug"])
