"""`trebuchet export`: a GGUF read back, an adapter folder that PEFT opens, the lines that serve it, and what is refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trebuchet.launcher import api, cli, record, worker
from trebuchet.launcher.errors import JobFailed, ModelError
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.training import gguf_file
from trebuchet.training.card import card
from trebuchet.training.finished import open_finished

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    root = tmp_path_factory.mktemp("runs") / "it's mine"
    changes = {
        "strategy.method": "lora",
        "strategy.lora": {"r": 4},
        "optimization.learning_rate": 1e-2,
        "evaluation.forgetting": 2,
    }
    folder, plan = api.begin(tiny_config({**changes, "optimization.max_steps": 4, "tracking": []}, output=str(root)))
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    assert cli.main(["merge", str(root)]) == 0
    return root


@pytest.mark.parametrize(("quant", "largest"), [("f16", 2e-3), ("q8_0", 5e-2)])
def test_a_gguf_is_read_back_and_answers_as_the_merged_model(
    run: Path, capsys: pytest.CaptureFixture[str], quant: str, largest: float
) -> None:
    """f16 keeps 11 bits of a weight, q8_0 7 bits and a sign against the largest of 32."""
    assert cli.main(["export", str(run), "--format", "gguf", "--quant", quant]) == 0
    said = capsys.readouterr().out
    (file,) = (run / "exports" / f"gguf-{quant}").glob("*.gguf")
    assert "read back: relative difference" in said and str(file) in said
    options = {"gguf_file": file.name, "dtype": torch.float32}
    found = AutoModelForCausalLM.from_pretrained(file.parent, **options)(IDS).logits
    wanted = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(IDS).logits
    assert 0 < float((found - wanted).square().mean().sqrt() / wanted.std()) < largest
    ours, back = (
        AutoTokenizer.from_pretrained(run / "merged"),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    text = "north river 7 stone é"
    assert back(text).input_ids == ours(text).input_ids
    assert "Loaded back with transformers" in (file.parent / "README.md").read_text()


def test_rows_that_are_not_interleaved_are_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "interleaved", lambda name, values, config: values)
    output = run / "wrong.gguf"
    with pytest.raises(JobFailed, match="does not answer"):
        gguf_file.write(run / "merged", output, "f16", [row.tolist() for row in IDS], 0)
    assert not list(run.glob("*wrong*"))


def test_interleaving_is_that_of_the_format() -> None:
    class Config:
        num_attention_heads, num_key_value_heads = 2, 1

    rows = np.arange(8.0)[:, None] @ np.ones((1, 3))
    assert gguf_file.interleaved("q_proj", rows, Config)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_file.interleaved("v_proj", rows, Config) is rows


def test_an_adapter_folder_comes_with_the_lines_that_serve_it(
    run: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    assert cli.main(["export", str(run), "--format", "adapter"]) == 0
    folder = run / "exports" / "adapter"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("serve"))
    words = shlex.split(line.removeprefix("serve"))
    assert words == [
        "vllm",
        "serve",
        str(tiny_model),
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        f"it's mine={folder}",
    ]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder))
    assert subprocess.run(["bash", "-n", str(folder / "serve.sh")]).returncode == 0
    ray = yaml.safe_load((folder / "serve.yaml").read_text())["applications"][0]["args"]["llm_configs"][0]
    assert ray["engine_kwargs"]["enable_lora"] and ray["model_loading_config"]["model_source"] == str(tiny_model)
    kept = record.read(RunFolder(run))["exports"]["adapter"]
    assert kept["file"] == str(folder) and kept["files"] == record.read(RunFolder(run))["model_files"]
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "held-out" in card and str(tiny_model) not in card
    assert cli.main(["export", str(run), "--format", "adapter"]) == 2  # it is there already
    assert "exists" in capsys.readouterr().err


def test_the_card_names_data_plan_evaluation_and_the_licence_of_the_base(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# a base\nlicense: other\n")
    (base / "LICENSE").write_text("its text")
    finished = open_finished(str(run))
    assert "do not name a licence" in card(finished)
    finished.__dict__["base"] = base
    text, kept = card(finished), finished.record
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "under `apache-2.0`; its licence text is beside this file (LICENSE)" in text
    for source in kept["data"]["sources"]:
        assert f"{source['rows']} rows for {source['used_for']}, fingerprint `{source['fingerprint']}`" in text
    assert "| method | lora, none over 1 rank (cpu) |" in text and "| adapter | r 4, alpha" in text
    for key in ("loss", "perplexity", "accuracy", "bits_per_byte"):
        before, after = (kept["evaluation"][when][key] for when in ("before", "after"))
        assert f"| {key.replace('_', ' ')} | {before:.4f} | {after:.4f} |" in text
    assert np.exp(kept["evaluation"]["after"]["loss"]) == pytest.approx(kept["evaluation"]["after"]["perplexity"])


def test_one_command_makes_an_adapter_run_a_model_for_plain_transformers(run: Path) -> None:
    assert cli.main(["export", str(run), "--format", "hf"]) == 0
    found, merged = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("exports/hf", "merged"))
    assert torch.equal(found(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral"])
def test_other_llama_shapes_are_read_back(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    """Biases and head sizes that are not hidden / heads included; of the tokenizer every token."""
    import transformers

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    more: dict[str, Any] = {"sliding_window": None} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128 if kind == "Qwen3" else 16, max_position_embeddings=256, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    gguf_file.write(tmp_path / "model", tmp_path / "x.gguf", "f16", [row.tolist() for row in IDS], 0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert type(found).__name__ == ("LlamaForCausalLM" if kind == "Mistral" else type(model).__name__)
    wanted = model(IDS).logits
    assert float((found(IDS).logits - wanted).square().mean().sqrt() / wanted.std()) < 2e-3
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert back.convert_ids_to_tokens(range(len(tokenizer))) == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def test_a_tokenizer_of_another_kind_and_a_sliding_window_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    import json

    from transformers import MistralConfig, MistralForCausalLM

    shutil.copytree(tiny_model, tmp_path / "unigram")
    file = tmp_path / "unigram" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}
    file.write_text(json.dumps(raw))
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        sliding_window=64,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    for name, says in (("unigram", "is not byte-level BPE"), ("windowed", "sliding window")):
        with pytest.raises(ModelError, match=says):
            gguf_file.write(tmp_path / name, tmp_path / "x.gguf", "f16", [[1, 2]], 0)
    assert not list(tmp_path.glob("*.gguf*"))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="Llama-shaped"):
        gguf_file.write(tmp_path / "gpt2", tmp_path / "x.gguf", "f16", [[1, 2]], 0)


def test_eval_of_the_saved_model_says_what_the_run_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Opened with plain transformers and PEFT: the same rows, the same losses, the same words of the base; other metrics."""
    import json

    was = json.loads((run / "evaluation.json").read_text())
    assert cli.main(["eval", str(run), "--metrics", "exact_match,compiles", "--generations", "3"]) == 0
    assert "held-out" in capsys.readouterr().out
    now = json.loads((run / "evaluation.json").read_text())
    for when in ("before", "after"):
        np.testing.assert_allclose(now[when]["rows"]["loss"], was[when]["rows"]["loss"], rtol=1e-4)
        assert now[when]["rows"]["correct"] == was[when]["rows"]["correct"]
    assert now["before"]["said"] == was["before"]["said"] and len(now["samples"]) == 3
    assert {"exact_match", "compiles"} <= set(now["compared"])
    assert cli.main(["eval", str(run), "--metrics", "exact"]) == 2
    assert "did you mean 'exact_match'" in capsys.readouterr().err


def test_several_are_asked_one_after_the_other_into_one_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint holds the weights of the model, so its figures are the model's; nothing is written into the run for it. A run
    that cannot be asked is a row with its reason."""
    import json

    shutil.copytree(run, tmp_path / "damaged", ignore=shutil.ignore_patterns("merged", "exports"))
    for file in (tmp_path / "damaged" / "checkpoints").glob("step-*/trainable.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["eval", str(run)]) == 0
    before = (run / "evaluation.json").read_bytes()
    output = tmp_path / "table.jsonl"
    words = ["eval", str(run), str(tmp_path / "damaged"), str(run), "--checkpoints", "--output", str(output)]
    capsys.readouterr()
    assert cli.main(words) == 1
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(Path(row["run"]).name, row["checkpoint"]) for row in rows] == [
        (run.name, 4), (run.name, None), ("damaged", 4), ("damaged", None),
    ]  # fmt: skip
    at_four, model, broken, whole = rows
    assert at_four["after"] == pytest.approx(model["after"]) and at_four["before"] == pytest.approx(model["before"])
    assert model["after"]["loss"] < model["before"]["loss"] and whole["after"] == pytest.approx(model["after"])
    assert "trainable.safetensors" in broken["error"] and broken["after"] is None and broken["error"] in shown
    assert json.loads((run / "evaluation.json").read_bytes()) == json.loads(before)
    assert shown.splitlines()[0].split()[:4] == ["RUN", "BASE", "LOSS", "LOSS"] and str(output) in shown


def test_lm_evaluation_harness_runs_a_task_of_the_user_s_on_the_saved_model(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two answers a row; the reference is the likelier one by PEFT's model in float64."""
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    import json

    from peft import PeftModel

    choices = [[f" {a} river", f" {b} stone"] for a in ("north", "amber", "willow") for b in ("copper", "lantern")]
    rows = [{"question": f"{i} north", "choices": pair, "answer": i % 2} for i, pair in enumerate(choices)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    assert cli.main(["eval", str(run), "--harness", str(tmp_path / "mine.yaml")]) == 0
    found = json.loads((run / "run.json").read_text())["evaluation"]["harness"]
    assert "mine/acc,none: " in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    model = PeftModel.from_pretrained(base, str(run / "model")).double()
    right = []
    for row in rows:
        said = []
        for choice in row["choices"]:
            prompt, ids = (tokenizer(text).input_ids for text in (row["question"], row["question"] + choice))
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            said.append(float(logp.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum()))
        right.append(said.index(max(said)) == row["answer"])
    assert found["mine/acc,none"] == pytest.approx(sum(right) / len(right)) and found["mine/acc_stderr,none"] > 0
    assert cli.main(["eval", str(run), "--harness", str(tmp_path / "no.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err
