"""Real checkpoints against transformers, the cache against huggingface_hub, and a Hub on this machine."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trebuchet.launcher.errors import ModelError
from trebuchet.launcher.model_files import cached_snapshot, read_checkpoint
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.schema import Model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}


def saved(
    folder: Path, model_type: str, *, shard: str = "5GB", dtype: torch.dtype = torch.float32, **more: Any
) -> PreTrainedModel:
    """A small model with random weights, saved as users have it on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **more}), dtype=dtype)
        model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_folder_that_transformers_saved(tmp_path: Path, tied: bool, shard: str) -> None:
    model = saved(tmp_path, "llama", tie_word_embeddings=tied, shard=shard, dtype=torch.bfloat16)
    spec = load_model_spec(Model(name=str(tmp_path)))
    assert (spec.params, spec.source, spec.dtype) == (model.num_parameters(), "folder", "bf16")
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == "5GB")
    assert spec.weights_bytes == sum(file.stat().st_size for file in files)
    assert spec.path == str(tmp_path)


@pytest.mark.parametrize(
    "model_type", ["starcoder2", "cohere", "gpt_neox", "phi", "opt", "stablelm", "gpt2", "gptj", "codegen", "bloom"]
)
def test_a_family_without_a_rule_is_counted_from_its_headers(tmp_path: Path, model_type: str) -> None:
    """GPT-2 and those after it say nothing of the width of their MLP, which is four times the model's."""
    more: dict[str, Any] = {"ffn_dim": 80, "word_embed_proj_dim": 32} if model_type == "opt" else {}
    if model_type in ("gptj", "codegen"):
        more = {"rotary_dim": 4}
    model = saved(tmp_path, model_type, **more)
    spec = load_model_spec(Model(name=str(tmp_path)))
    assert spec.params == model.num_parameters()
    kinds = (torch.nn.Linear, Conv1D)
    linear = [m for n, m in model.named_modules() if isinstance(m, kinds) and (".layers." in n or ".h." in n)]
    assert spec.linear_params == sum(m.weight.numel() for m in linear)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert spec.lora_params(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=f"model_type '{model_type}' is not one whose parameters can be counted"):
        load_model_spec(Model(name=str(tmp_path)))


def test_experts_of_a_family_without_a_rule_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2_moe", num_experts=3)
    with pytest.raises(ModelError, match=r"'qwen2_moe' is not supported: its config\.json has num_experts.*mixtral"):
        load_model_spec(Model(name=str(tmp_path)))


def test_weights_of_another_model_are_noticed(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    with pytest.raises(ModelError, match=f"and the safetensors files hold {model.num_parameters():,}; one of them"):
        load_model_spec(Model(name=str(tmp_path)))


def test_a_tied_head_that_was_saved_and_old_buffers_do_not_count(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_model_spec(Model(name=str(tmp_path))).params == model.num_parameters()


@pytest.mark.parametrize("damage", ["cut", "length", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut": whole[:-10], "length": b"\xff" * 8 + whole[8:], "text": b"version https://git-lfs"}[damage]
    )
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file.*copy it again"):
        load_model_spec(Model(name=str(tmp_path)))


def test_a_folder_without_weights_is_enough_for_a_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    (tmp_path / "training_args.bin").write_bytes(b"PK")
    spec = load_model_spec(Model(name=str(tmp_path)))
    assert (spec.weights_bytes, spec.dtype) == (None, "fp32")


def test_a_missing_shard_leaves_the_count_to_config_json(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", shard="20KB")
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    assert read_checkpoint(tmp_path) is None
    spec = load_model_spec(Model(name=str(tmp_path)))
    assert (spec.params, spec.weights_bytes) == (model.num_parameters(), None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.gguf": b"GGUF"}, r"holds a GGUF file \(x\.gguf\), which is for inference"),
        (
            {"pytorch_model.bin": b"PK"},
            "only as a pickle.*because it can run code; save the model again as safetensors",
        ),
        ({"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"PK"}, "only as a pickle"),
        ({"adapter_config.json": b"{}"}, "holds an adapter, not a model"),
        ({}, r"has no config\.json"),
        ({"config.json": b'{"model_type": "llama",'}, "cannot be read as JSON"),
        ({"config.json": b'["llama"]'}, "names no model_type"),
        (
            {"config.json": b'{"model_type": "llama"}', "model.safetensors.index.json": b"{}"},
            "is not a safetensors index",
        ),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model_spec(Model(name=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_the_cache_is_read_as_huggingface_hub_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--someone--small", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "refs" / "pr", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    saved(repo / "blobs" / "files", "llama")
    (snapshot / "config.json").symlink_to("../../blobs/files/config.json")
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "pr" / "1").write_text(commit)
    for revision in (None, "main", "pr/1", commit, "other", "fedcba98"):
        theirs = try_to_load_from_cache("someone/small", "config.json", cache_dir=tmp_path, revision=revision)
        ours = cached_snapshot("someone/small", revision)
        assert (str(ours / "config.json") if ours else None) == theirs
    spec = load_model_spec(Model(name="someone/small"), offline=True)
    assert (spec.source, spec.revision, spec.path) == ("cache", commit, str(snapshot))


@pytest.mark.parametrize(
    "environment",
    [{}, {"HF_HOME": "/x/home"}, {"HF_HOME": "/x/home", "HF_HUB_CACHE": "/x/cache"}, {"XDG_CACHE_HOME": "/x/xdg"}],
    ids=["default", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"],
)
def test_the_cache_is_where_huggingface_hub_looks(environment: dict[str, str]) -> None:
    code = (
        "from huggingface_hub.constants import HF_HUB_CACHE, HF_HOME; "
        "from trebuchet.launcher.model_files import cache_root, hf_home; "
        "assert (str(cache_root()), str(hf_home())) == (HF_HUB_CACHE, HF_HOME), (cache_root(), HF_HUB_CACHE)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "HUGGINGFACE_"))}
    subprocess.run([sys.executable, "-c", code], env=clean | environment, check=True)


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a download of config.json uses."""

    config = json.dumps({"model_type": "llama", **SIZES}).encode()
    errors: ClassVar = {"gone": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "empty": (404, "EntryNotFound")}

    def do_HEAD(self) -> None:
        _, _, name, _, revision, file = self.path.split("/", 5)
        status, code = self.errors.get(name, (200, ""))
        if revision == "wrong":
            status, code = 404, "RevisionNotFound"
        self.send_response(status if file == "config.json" else 404)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(self.config) if status == 200 else 0))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.config)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_hub_is_asked_last_and_its_answers_are_told_apart(hub: str, tmp_path: Path) -> None:
    code = """
import sys, json, time
from trebuchet.launcher.errors import ModelError
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.schema import Model
for name, revision in json.loads(sys.argv[1]):
    try:
        spec = load_model_spec(Model(name=name, revision=revision))
        print(spec.source, spec.params, spec.revision, flush=True)
    except ModelError as error:
        print(error, flush=True)
"""
    asked = [
        ["a/new", None],
        ["a/new", None],
        ["a/gone", None],
        ["a/gated", None],
        ["a/empty", None],
        ["a/new", "wrong"],
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment = {**clean, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=True)
    found, again, gone, gated, empty, wrong = done.stdout.splitlines()
    commit = "0123456789abcdef0123456789abcdef01234567"
    kinds = [line.split() for line in (found, again)]
    assert [kind[0] for kind in kinds] == ["hub", "cache"] and kinds[0][1:] == kinds[1][1:] and kinds[0][2] == commit
    assert "a/gone is no local folder" in gone and "the Hub has none of that name" in gone
    assert "a/gated is gated on the Hub: accept its licence" in gated and "HF_TOKEN" in gated
    assert "a/empty has no config.json on the Hub" in empty
    assert "a/new has no revision 'wrong' on the Hub" in wrong


def test_a_hub_that_does_not_answer_is_given_up_quickly(tmp_path: Path) -> None:
    code = (
        "import time; from trebuchet.launcher.model_spec import load_model_spec\n"
        "from trebuchet.launcher.schema import Model\n"
        "import huggingface_hub\nstart = time.perf_counter()\n"
        "try: load_model_spec(Model(name='a/new'))\n"
        "except Exception as error: print(time.perf_counter() - start, error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, message = done.stdout.split(" ", 1)
    # huggingface_hub itself retries for 23 s, most of them asleep; ours takes one or two, and more on a busy machine
    assert float(seconds) < 15 and "the Hub does not answer (" in message
