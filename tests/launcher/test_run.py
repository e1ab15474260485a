"""`trebuchet run` as a user starts it: real processes, a real (tiny) model, and what stands in the folder afterwards.

Each run costs some ten seconds of imports, so few runs are made and each is looked at from many sides.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from trebuchet.launcher import api, cli, logs, worker
from trebuchet.launcher.job import JobState
from trebuchet.launcher.run_folder import open_run

pytestmark = pytest.mark.slow
LIMIT_S = 240  # for one awaited event on a loaded machine


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command line as a process of its own in `folder`, its output in one pipe each."""
    command = [sys.executable, "-m", "trebuchet.launcher.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl that are steps, by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").exists() else []
    values = [json.loads(line) for line in lines if line.endswith("}")]
    return {v["step"]: v for v in values if "loss" in v}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str] | None = None) -> None:
    """Until metrics.jsonl has a line of `step` or a later one."""
    until = time.monotonic() + LIMIT_S
    while not any(s >= step for s in steps_of(run)):
        assert time.monotonic() < until, f"no step {step} within {LIMIT_S} s"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]
) -> tuple[Path, str, str]:
    """One undisturbed full fine-tune: (folder of the run, stdout, stderr), below a name with a space and a quote."""
    folder = tmp_path_factory.mktemp("it's a folder")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config()), encoding="utf-8")
    code, out, err = finish(start(folder, "run", "tiny.yaml"))
    assert code == 0, out + err
    return folder / "runs" / "tiny", out, err


def test_the_run_folder_holds_what_the_design_says(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished
    for name in (
        "train.yaml",
        "plan.json",
        "run.json",
        "metrics.jsonl",
        "logs/rank-0.log",
        "model/config.json",
        "model/tokenizer.json",
    ):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-30", "step-40"]  # every 10, keep 2
    assert not list(run.rglob("*.writing")) and not (run / "stop").exists()
    found = record_of(run)
    expected = {"state": "SUCCEEDED", "exit_code": 0, "error": None, "step": 40, "steps": 40, "seed": 0, "run": "tiny"}
    assert {key: found[key] for key in expected} == expected
    assert found["data"]["train"]["samples"] == 40 and found["data"]["eval"]["samples"] == 8
    assert found["versions"]["torch"] and found["data"]["fingerprint"] and found["kernels"]["applied"]
    assert found["parameters"]["trainable"] == found["parameters"]["total"] == found["model"]["params"]
    assert [(a["state"], a["first_step"], a["last_step"]) for a in found["attempts"]] == [("SUCCEEDED", 0, 40)]
    assert found["evaluation"]["after"]["loss"] < 0.9 * found["evaluation"]["before"]["loss"]


def test_metrics_have_one_complete_line_a_step(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished
    steps = steps_of(run)
    assert list(steps) == list(range(1, 41))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_s", "epoch", "peak_memory_bytes"}
    assert all(keys <= set(values) and 0 < values["trained_tokens"] < values["tokens"] for values in steps.values())
    evaluations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert [e["step"] for e in evaluations] == [20, 40]
    assert (
        evaluations[-1]["eval_loss"] == record_of(run)["evaluation"]["after"]["loss"]
    )  # the same rows, the same weights


def test_a_new_user_sees_the_plan_the_progress_and_the_result_and_no_noise(finished: tuple[Path, str, str]) -> None:
    run, out, err = finished
    assert "> full none" in out and "Held-out sample 2" in out and f"model   {run / 'model'}" in out
    assert "step 40/40  loss" in err and "before training: held-out loss" in err
    for noise in (
        "WARNING",
        "Warning",
        "warn",
        "Traceback",
        "Failed to load",
        "Setting accelerator",
        "deprecated",
        "[W",
    ):
        assert noise not in out + err, out + err


def test_the_exported_model_opens_and_reproduces_the_recorded_loss(
    finished: tuple[Path, str, str], held_out_file: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _, _ = finished
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.use_cache and model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    summed = count = 0.0
    for line in held_out_file.read_text().splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt").input_ids
        prompt = tokenizer(
            tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ).input_ids
        end = whole[0].tolist().index(tokenizer.eos_token_id, len(prompt)) + 1  # the answer and its end token
        with torch.no_grad():
            logp = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        summed -= float(logp[len(prompt) - 1 : end - 1].sum())
        count += end - len(prompt)
    recorded = record_of(run)["evaluation"]["after"]
    assert recorded["tokens"] == count
    assert recorded["loss"] == pytest.approx(summed / count, rel=1e-5)  # fp32 against float64


def test_status_list_and_logs_read_the_finished_run(
    finished: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, err = finished
    assert cli.main(["status", str(run), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["run"], status["state"], status["step"], status["steps"]) == ("tiny", "SUCCEEDED", 40, 40)
    assert {"handle", "state", "reason", "first_step", "last_step"} <= set(status["attempts"][0])
    assert cli.main(["status", str(run)]) == 0 and "SUCCEEDED  step 40 of 40" in capsys.readouterr().out
    assert cli.main(["list", str(run.parent)]) == 0 and "tiny  SUCCEEDED  40/40" in capsys.readouterr().out
    assert cli.main(["list", str(run.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["loss_after"] == record_of(run)["evaluation"]["after"]["loss"]
    assert cli.main(["logs", str(run), "-f"]) == 0  # ended: does not wait
    assert "step 40/40" in capsys.readouterr().out and "step 40/40" in err
    for verb in ("resume", "cancel"):
        assert cli.main([verb, str(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_resolved_configuration_trains_the_same_again(finished: tuple[Path, str, str]) -> None:
    """train.yaml is complete: from another working directory it plans the same thing."""
    run, _, _ = finished
    again = api.plan(str(run / "train.yaml"))
    recorded = json.loads((run / "plan.json").read_text())
    chosen = json.loads(again.model_dump_json())["chosen"]
    assert {**chosen, "memory": None} == {**recorded["chosen"], "memory": None}  # what is free now is another number
    assert json.loads(again.model_dump_json())["config"] == recorded["config"]


def test_stopped_killed_and_damaged_it_still_trains_the_same(
    finished: tuple[Path, str, str], tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    """Ctrl+C, resume, kill -9 of the rank, a damaged checkpoint, resume: losses and weights are those of the quiet run."""
    quiet, _, _ = finished
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny_config(output="out")), encoding="utf-8")
    run = tmp_path / "out"

    process = start(tmp_path, "run", "t.yaml")
    wait_for_step(run, 2, process)
    assert cli.main(["resume", str(run)]) == 2  # it is running
    process.send_signal(
        signal.SIGINT
    )  # to the launcher alone; Ctrl+C on a terminal reaches no more, ranks have their own session
    code, _, err = finish(process)
    stopped = record_of(run)
    assert code == 130 and stopped["state"] == "CANCELLED" and 2 <= stopped["step"] < 40, err
    assert "stopped after step" in err and "Traceback" not in err
    assert (run / "checkpoints" / f"step-{stopped['step']}" / "manifest.json").exists()

    process = start(tmp_path, "resume", "out")
    wait_for_step(run, max(stopped["step"], 20) + 3, process)
    (rank,) = psutil.Process(record_of(run)["attempts"][-1]["ranks"]).children()
    rank.kill()
    code, _, err = finish(process)
    killed = record_of(run)
    assert code == 1 and killed["state"] == "FAILED" and "ended without a word" in killed["error"], err
    assert "Traceback" not in err, err

    valid = sorted((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    weights = valid[-1] / "trainable.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    code, out, err = finish(start(tmp_path, "resume", "out"))
    assert code == 0, out + err
    assert f"{valid[-1].name} is not resumed from: trainable.safetensors" in err
    done = record_of(run)
    assert [a["state"] for a in done["attempts"]] == ["CANCELLED", "FAILED", "SUCCEEDED"]
    assert done["attempts"][1]["first_step"] == stopped["step"] and done["attempts"][2]["first_step"] == int(
        valid[-2].name[5:]
    )

    same = ("loss", "grad_norm", "lr", "tokens", "epoch")
    assert [{k: v[k] for k in same} for v in steps_of(run).values()] == [
        {k: v[k] for k in same} for v in steps_of(quiet).values()
    ]
    assert (run / "model" / "model.safetensors").read_bytes() == (quiet / "model" / "model.safetensors").read_bytes()
    assert done["evaluation"] == record_of(quiet)["evaluation"]


def test_two_processes_submitted_followed_and_cancelled(
    tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    """LoRA over two gloo ranks in the background; only rank 0 has held-out rows. The losses are those of one process."""
    changes = {
        "strategy.method": "lora",
        "data.packing": False,
        "data.max_length": 64,
        "optimization.global_batch_size": 6,
        "optimization.max_steps": 100_000,
        "evaluation.every": 50_000,
        "evaluation.max_rows": 1,
        "checkpointing.every": 50_000,
        "optimization.schedule": "constant",
    }
    two = {"name": "local", "processes": 2}
    handle = api.submit(tiny_config(changes, output=str(tmp_path / "two"), cluster=two))
    run = handle.folder
    folder = open_run(str(run))
    assert api.current_state(folder) in (JobState.PENDING, JobState.RUNNING)
    folder_of_one, plan = api.begin(tiny_config({**changes, "optimization.max_steps": 5}, output=str(tmp_path / "one")))
    folder_of_one.logs.mkdir()
    assert worker.train(folder_of_one, plan)  # in this process, while the ranks start

    wait_for_step(run, 5)
    assert api.current_state(folder) == JobState.RUNNING
    assert record_of(run)["attempts"][0]["handle"] == handle.handle and handle.handle.startswith("local://")
    assert cli.main(["cancel", str(run)]) == 0
    told = list(logs.lines(folder, follow=True))  # returns when the run has ended
    assert any(line.startswith("[0] stopped after step") for line in told)
    found = record_of(run)
    assert found["state"] == "CANCELLED" and found["attempts"][0]["last_step"] == found["step"] >= 5
    assert json.loads((run / "plan.json").read_text())["chosen"]["parallel"] == "ddp" and folder.log(1).exists()

    said = (run / "logs" / "launcher.log").read_text()
    assert not [noise for noise in ("Warning", "WARNING", "Traceback", "[W", "[rank") if noise in said], said

    one, both = ([steps_of(r)[s]["loss"] for s in range(1, 6)] for r in (tmp_path / "one", run))
    assert both == pytest.approx(one, rel=1e-5) and len(set(one)) == 5
    measured = [json.loads((r / "evaluation.json").read_text())["before"]["loss"] for r in (tmp_path / "one", run)]
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)
