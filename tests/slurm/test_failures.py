"""What ends a run and is not its fault, on a real Slurm: memory, nodes, ranks. What follows is read from Slurm itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import cli, record
from trebuchet.launcher.plan import Plan

from .cluster import SlurmCluster
from .running import finish, losses, run_job, said, submit

pytestmark = pytest.mark.slow
Config = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def wide_attention(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """A model whose scores take 0.6 GiB a row of 1,024 tokens (16 heads, eager, 2 layers), and such rows: a micro-batch decides
    over the memory, and little else does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(tiny_model)
    config.update(
        {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4, "max_position_embeddings": 2048}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, model_max_length=2048)
    tokenizer.save_pretrained(folder / "model")
    text = " ".join(map(str, range(2000)))
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return {
        "model": {"name": str(folder / "model"), "dtype": "fp32", "attention": "eager"},
        "data": {"train": {"path": str(folder / "rows.jsonl"), "format": "text"}, "eval": 0, "max_length": 1024},
        "objective": "pretrain",
        "evaluation": {"every": 1.0, "generations": 0},
    }


def test_out_of_memory_goes_on_with_a_smaller_micro_batch(
    slurm: SlurmCluster,
    cluster_file: Callable[..., str],
    tiny_config: Config,
    wide_attention: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four rows at once take 3 GiB, one takes 1.2 to 1.7, and 2.3 are given. In one run torch's own allocation fails (ulimit -d),
    in the other Slurm kills what is resident (--mem). Both go on by themselves, with the same global batch and the same losses."""
    changes = {
        "optimization.max_steps": 1,
        "checkpointing.every": 100,
        "optimization.warmup": 0,
        "optimization.micro_batch": 4,
    }
    limits = {
        "oom": {"setup": [f"ulimit -d {int(2.3 * 2**20)}"]},
        "host-oom": {"memory": f"{int(2.3 * 2**10)}M"},
    }
    runs = {
        kind: submit(tiny_config(changes, output=str(tmp_path / kind), **wide_attention), cluster_file(**limit))
        for kind, limit in limits.items()
    }
    for kind, run in runs.items():
        finish(run)
        found = record.read(run)
        assert found["state"] == "SUCCEEDED", said(run)
        *before, last = found["attempts"]
        assert before and {a["kind"] for a in before} == {kind} and {a["state"] for a in before} == {"OUT_OF_MEMORY"}
        assert "Goes on with micro-batch 2 instead of 4" in before[0]["reason"]
        assert last["handle"] == before[0]["handle"]  # requeued, not submitted again
        assert f"Restarts={len(before)} " in slurm.ask("scontrol", "show", "job", run_job(run))
        chosen = Plan.model_validate_json(run.plan.read_text()).chosen
        assert (
            chosen is not None
            and chosen.micro_batch == 4 >> len(before)
            and chosen.micro_batch * chosen.accumulation == 4
        )
        assert cli.main(["status", str(run.root)]) == 0
        shown = capsys.readouterr().out
        assert "OUT_OF_MEMORY" in shown and "Goes on with micro-batch 2" in shown
    assert "can't allocate memory" in record.read(runs["oom"])["attempts"][0]["reason"]
    assert losses(runs["oom"]) == pytest.approx(losses(runs["host-oom"]), rel=1e-5)  # fp32 sums in another order
