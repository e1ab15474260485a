"""`trebuchet merge` against PEFT's own merge in float64 and bitsandbytes' weights, and the adapters that it must refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from trebuchet.launcher import api, cli, record, worker
from trebuchet.launcher.errors import JobFailed, RunError
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.training import merge as merging
from trebuchet.training.finished import open_finished

from .merged import by_peft, logits, opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> dict[str, Path]:
    """A finished run of each adapter method, eight steps each."""
    made = {}
    for method in ("lora", "qlora"):
        changes = {"strategy.method": method, "strategy.lora": {"r": 8, "alpha": 16}, "model.revision": "v7"}
        changes |= {"optimization.learning_rate": 1e-2}
        root = tmp_path_factory.mktemp("runs") / method
        tree = tiny_config({**changes, "optimization.max_steps": 8, "tracking": []}, output=str(root))
        folder, plan = api.begin(tree)
        folder.logs.mkdir()
        assert worker.train(folder, plan)
        made[method] = root
    return made


@pytest.fixture
def run_of(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a finished run that a test may damage."""

    def copy(method: str) -> Path:
        return Path(shutil.copytree(runs[method], tmp_path / method))

    return copy


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_lora_merged_from_the_command_line_is_pefts_merge(
    run_of: Callable[[str], Path], tiny_model: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("lora")
    assert cli.main(["merge", str(run)]) == 0
    merged = opened(run / "merged")
    torch.testing.assert_close(logits(merged), logits(by_peft(opened(tiny_model), run / "model")), rtol=1e-5, atol=1e-5)
    assert logits(merged).sub(logits(opened(tiny_model))).abs().max() > 0.1  # and not the base
    found = record.read(RunFolder(run))["merge"]
    assert found["base"] == "original" and found["dtype"] == "fp32" and not found["untied"] and not found["unread"]
    assert 0 < found["difference"]["relative"] < 1e-5 and found["difference"]["prompts"] == 4
    card = (run / "merged" / "README.md").read_text()
    assert f"{found['difference']['relative']:.3g}" in card and "original weights of the base" in card
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template
    # From the merged file back to the adapter, the base with its revision, the rows by their content, and the seed.
    capsys.readouterr()
    assert cli.main(["show", str(run), "--lineage", "--json"]) == 0
    back = json.loads(capsys.readouterr().out)
    assert back["merged"]["files"]["model.safetensors"] == sha256(run / "merged" / "model.safetensors")
    adapter = sha256(run / "model" / "adapter_model.safetensors")
    assert back["merged"]["adapter_files"]["adapter_model.safetensors"] == adapter
    assert back["model"]["files"]["adapter_model.safetensors"] == adapter
    assert back["base"] == {"name": str(tiny_model), "revision": "v7"} and back["seed"] == 0
    sources = {one["used_for"]: one for one in back["data"]["sources"]}
    assert sources["train"]["path"] == str(rows_file) and sources["train"]["rows"] == 40
    assert all(one["fingerprint"] for one in sources.values()) and back["data"]["fingerprint"]


@pytest.mark.parametrize("base", ["quantized", "original"])
def test_qlora_merges_into_the_weights_named(run_of: Callable[[str], Path], tiny_model: Path, base: str) -> None:
    """quantized: what bitsandbytes' layers of the run's own model hold, dequantized."""
    from bitsandbytes.functional import dequantize_4bit
    from trebuchet.strategies.prepare import prepare

    run = open_finished(str(run_of("qlora")))
    found = merging.merge(run, run.folder.merged, merging.Options(base=base))
    wanted = opened(tiny_model)
    if base == "quantized":
        config = run.plan.config
        net = prepare(run.base, config.model, config.strategy, run.chosen, torch.device("cpu"), 0).model
        exact = {
            n: dequantize_4bit(p.data, p.quant_state) for n, p in net.named_parameters() if hasattr(p, "quant_state")
        }
        assert len(exact) == 14  # seven linear layers in each of two blocks
        for name, weight in exact.items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            wanted.get_parameter(plain).data.copy_(weight)
        assert found["difference_from_trained"] is None
    else:
        assert 0.01 < found["difference_from_trained"]["relative"] < 1  # the quantization error is not hidden
    merged = logits(opened(run.folder.merged))
    torch.testing.assert_close(merged, logits(by_peft(wanted, run.folder.model)), rtol=1e-5, atol=1e-5)
    assert ("NF4 weights it was trained on" in (run.folder.merged / "README.md").read_text()) == (base == "quantized")


def replaced(run: Path, tiny_model: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts another adapter into the run, made by PEFT with random values everywhere; logits of PEFT's forward with the adapter beside
    the base and of PEFT's own merge, both in float64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    peft = get_peft_model(opened(tiny_model), config)
    for parameter in (p for p in peft.parameters() if p.requires_grad):
        parameter.data += torch.randn_like(parameter) * 0.1
    shutil.rmtree(run / "model")
    peft.save_pretrained(run / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(run / "model")
    return logits(peft), logits(peft.merge_and_unload())


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "embedding-trained": {"modules_to_save": ["embed_tokens"]},
    "embedding-and-head-trained-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding-and-head-adapted": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "one-module": {"bias": "none", "lora_bias": False, "target_modules": ["down_proj"], "use_dora": True, "use_rslora": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_like_peft(run_of: Callable[[str], Path], tiny_model: Path, kind: str) -> None:
    path = run_of("lora")
    beside, merged_by_peft = replaced(path, tiny_model, **KINDS[kind])
    run = open_finished(str(path))
    with pytest.raises(RunError, match="is not what the run wrote"):
        merging.merge(run, run.folder.merged, merging.Options())
    found = merging.merge(run, run.folder.merged, merging.Options(changed=True))
    merged = opened(run.folder.merged)
    torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-5)
    if (
        "-adapted" not in kind
    ):  # PEFT 0.21 adds both changes to the one tied weight there, and answers otherwise than before
        torch.testing.assert_close(logits(merged), merged_by_peft, rtol=1e-4, atol=1e-5)
    assert found["untied"] == (kind in ("embedding-trained", "embedding-and-head-adapted"))
    names = set(load_file(run.folder.merged / "model.safetensors"))
    assert ("lm_head.weight" in names) == found["untied"] == (not merged.config.tie_word_embeddings)


def spoil(adapter: Path, how: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "lora_B" in n)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
        return
    if how == "nan":
        tensors[name][0, 0] = float("nan")
    elif how == "missing":
        del tensors[name]
    elif how == "other shape":
        tensors[name] = tensors[name][:, :2].contiguous()
    elif how == "one bit":
        tensors[name].view(torch.int32)[0, 0] ^= 1
    elif how == "overflow":
        tensors = {n: t * (1e7 if "layers.0.self_attn.q_proj.lora_B" in n else 1) for n, t in tensors.items()}
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "changed", "says"),
    [
        ("truncated", True, "is damaged"),
        ("nan", True, "not finite"),
        ("missing", True, "1 tensors are missing"),
        ("other shape", True, "where .* belongs"),
        ("one bit", False, "is not what the run wrote"),
    ],
)
def test_a_damaged_adapter_is_refused_and_leaves_nothing(
    run_of: Callable[[str], Path], how: str, changed: bool, says: str
) -> None:
    run = open_finished(str(run_of("lora")))
    spoil(run.folder.model, how)
    with pytest.raises(RunError, match=says):
        merging.merge(run, run.folder.merged, merging.Options(changed=changed))
    assert not list(run.folder.root.glob("*merged*")) and "merge" not in record.read(run.folder)


def test_a_merge_that_answers_otherwise_is_refused(run_of: Callable[[str], Path]) -> None:
    """Values so large that fp16 cannot hold them: the same adapter merges in fp32."""
    run = open_finished(str(run_of("lora")))
    spoil(run.folder.model, "overflow")
    with pytest.raises(JobFailed, match="does not answer as base and adapter do"):
        merging.merge(run, run.folder.merged, merging.Options(changed=True, dtype="fp16"))
    assert not list(run.folder.root.glob("*merged*"))
    merging.merge(run, run.folder.merged, merging.Options(changed=True, dtype="fp32"))


def test_a_pickle_is_not_opened_unless_allowed(run_of: Callable[[str], Path]) -> None:
    run = open_finished(str(run_of("lora")))
    tensors = load_file(run.folder.model / "adapter_model.safetensors")
    (run.folder.model / "adapter_model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (run.folder.root / "executed",))

    torch.save({**tensors, "payload": Payload()}, run.folder.model / "adapter_model.bin")
    with pytest.raises(RunError, match="is a pickle"):
        merging.merge(run, run.folder.merged, merging.Options(changed=True))
    with pytest.raises(Exception, match=r"(?i)weights.only"):  # what is not a tensor is refused by torch even then
        merging.merge(run, run.folder.merged, merging.Options(changed=True, allow_pickle=True))
    assert not (run.folder.root / "executed").exists()
    torch.save(tensors, run.folder.model / "adapter_model.bin")
    merging.merge(run, run.folder.merged, merging.Options(changed=True, allow_pickle=True))


def test_a_whole_model_and_a_taken_folder_are_refused(run_of: Callable[[str], Path]) -> None:
    run = open_finished(str(run_of("lora")))
    run.folder.merged.mkdir()
    with pytest.raises(RunError, match="exists"):
        merging.merge(run, run.folder.merged, merging.Options())
    with pytest.raises(RunError, match="not quantized"):
        merging.merge(run, run.folder.root / "other", merging.Options(base="quantized"))


MEASURE = """
import resource, sys
from pathlib import Path
from trebuchet.training import merge as merging
from trebuchet.training.finished import open_finished
run = open_finished(sys.argv[1])
import peft, torch, transformers, bitsandbytes
run.prompts(4)
from trebuchet.training.streamed import skeleton
skeleton(run.base)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merging.merge(run, run.folder.merged, merging.Options(shard_bytes=32 * 2**20))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_model_of_many_shards_merges_in_the_memory_of_a_few(
    tmp_path: Path, tiny_model: Path, tiny_config: Callable[..., dict[str, Any]], run_of: Callable[[str], Path]
) -> None:
    """A base of 14 shards of 32 MiB: the peak grows by the shard read, the shard written, a layer in fp32 and little else."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(base, max_shard_size=32 * 2**20)
    shards = sorted(base.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in shards)
    assert len(shards) >= 12 and total > 300 * 2**20
    run = run_of("lora")
    plan = json.loads((run / "plan.json").read_text())
    plan["config"]["model"]["name"] = plan["model"]["path"] = plan["model"]["name"] = str(base)
    (run / "plan.json").write_text(json.dumps(plan))
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    peft.save_pretrained(run / "model")
    facts = record.read(RunFolder(run))
    record.update(RunFolder(run), model_files=None, data=facts["data"])
    done = subprocess.run([sys.executable, "-c", MEASURE, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (int(n) * 1024 for n in done.stdout.split()[-2:])
    assert len(list((run / "merged").glob("*.safetensors"))) >= 12
    assert after - before < 5 * 32 * 2**20 < total / 2, f"{(after - before) / 2**20:.0f} MiB"
