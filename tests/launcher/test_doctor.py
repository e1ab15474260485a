"""`doctor`: one run on this machine as it is, and each finding that can be brought about here."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version
from trebuchet.launcher import doctor_checks as checks
from trebuchet.launcher.doctor import Check, Report, doctor, render
from trebuchet.launcher.machine import GIB, Gpu

SECRET = "hf_thisMustNotBeShown"
L4 = Gpu(name="NVIDIA L4", uuid="GPU-1", memory_bytes=22 * GIB, free_bytes=22 * GIB, capability="8.9", driver="570.1")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        return doctor(tmp_path_factory.mktemp("run"))


def by_name(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_this_machine_is_described(report: Report) -> None:
    found = by_name(report)
    assert found["torch"].line == torch.__version__
    assert torch.__version__ in found["torch runs"].line and found["torch runs"].status == "ok"
    assert "NF4 computes on" in found["bitsandbytes runs"].line
    assert f"of {os.cpu_count()} cores" in found["host"].line
    assert found["writing"].status == "ok" and "HF_HUB_OFFLINE=1" in found["hugging face"].line
    assert {"python", "gpus", "shared memory", "disk for runs", "disk for models", "slurm", "ray"} <= set(found)


def test_secrets_are_named_and_never_shown(report: Report) -> None:
    assert by_name(report)["tokens"].line == "HF_TOKEN"
    assert SECRET not in render(report) + json.dumps(report.to_json())


def test_text_and_json_say_the_same(report: Report) -> None:
    data = json.loads(json.dumps(report.to_json()))
    text = render(report)
    assert [c["name"] for c in data["checks"]] == [c.name for c in report.checks]
    for check in data["checks"]:
        assert check["line"] in text and check["advice"] in text
    assert all(check.advice for check in report.checks if check.status != "ok")


@pytest.mark.parametrize(
    ("statuses", "status", "code", "verdict"),
    [
        (("ok", "ok"), "ok", 0, "fit to train"),
        (("ok", "warn"), "warn", 0, "fit to train, with 1 warning"),
        (("warn", "fail"), "fail", 1, "not fit to train: 1 failed, 1 warning"),
    ],
)
def test_the_worst_check_decides(statuses: tuple, status: str, code: int, verdict: str) -> None:
    made = Report(checks=tuple(Check(name="x", status=s, line="y", advice="z") for s in statuses))
    assert (made.status, made.exit_code, render(made).splitlines()[-1]) == (status, code, verdict)


def test_bounds_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(checks.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    every = [("", text) for text in project["dependencies"]]
    every += [(extra, text) for extra, texts in project["optional-dependencies"].items() for text in texts]
    parsed = [(extra, Requirement(text)) for extra, text in every]
    bounds = {(r.name, s.version, extra) for extra, r in parsed for s in r.specifier if s.operator == ">="}
    assert set(checks.requirements()) == bounds


def test_an_installed_package_tells_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the metadata of a wheel, in the form that setuptools writes
    declared = ["psutil>=5.9", "torch>=2.13; extra == 'train'", 'ray[default,tune]>=2.60; extra == "ray"', "x"]
    monkeypatch.setattr(checks.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(checks, "__file__", str(tmp_path / "launcher" / "doctor_checks.py"))
    found = checks.requirements()
    assert found == [("psutil", "5.9", ""), ("torch", "2.13", "train"), ("ray", "2.60", "ray")]


def test_old_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.1.0+cu118", "pydantic": None, "peft": None}
    monkeypatch.setattr(checks, "_version", lambda name: versions.get(name, "999.0"))
    found = {check.name: check for check in checks.packages()}
    assert (found["torch"].status, found["torch"].line) == ("fail", "2.1.0+cu118, needs 2.13 or newer")
    assert (found["pydantic"].status, found["peft"].status, found["accelerate"].status) == ("fail", "warn", "ok")


release = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@given(release, release, st.sampled_from(["", "+cpu", "+cu128"]))
def test_versions_compare_as_packaging_does(left: str, right: str, local: str) -> None:
    # a lower bound has no local label, so packaging's order of the public parts is the reference
    assert (checks.version_key(left + local) < checks.version_key(right)) == (Version(left) < Version(right))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: cannot open"),
        ("import os; os.abort()", "exit code -6: "),
        ("import signal; signal.pause()", "no answer within 1 s"),
    ],
    ids=["import error", "crash", "hang"],
)
def test_a_broken_torch_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, line: str) -> None:
    (tmp_path / "torch.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (found,) = checks.torch_stack([], timeout_s=1 if "pause" in module else 60)
    assert found.status == "fail" and found.line.startswith(line) and found.advice


@pytest.mark.parametrize(
    ("facts", "line", "advice"),
    [
        ({"cuda": None, "devices": 0}, "built for CPU", "install a CUDA build"),
        ({"cuda": "13.0", "devices": 0}, "sees 0 of 1 GPUs", "driver 570.1 may be too old for CUDA 13.0"),
        ({"cuda": "12.8", "devices": 1, "gpu_error": "no kernel image"}, "no kernel image", "build for this GPU"),
    ],
)
def test_a_torch_that_does_not_fit_the_gpus(facts: dict, line: str, advice: str) -> None:
    found = checks._torch({"version": "2.13.0", "hip": None, "threads": 8, **facts}, [L4])
    assert found.status == "fail" and line in found.line and advice in found.advice


@pytest.mark.parametrize("gpu", [True, False])
def test_what_else_must_run(gpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    facts = {"triton": {"error": "ImportError: libtriton.so"}, "bitsandbytes": {"line": "0.50.2, NF4 computes on cpu"}}
    found = {check.name: check.status for check in checks._others(facts, gpu)}
    if gpu:
        assert found == {"triton runs": "fail", "bitsandbytes runs": "ok", "compiler": "warn"}
    else:
        assert found == {"triton runs": "warn", "bitsandbytes runs": "ok"}


def test_a_busy_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Gpu(
        name="NVIDIA L4", uuid="GPU-2", memory_bytes=22 * GIB, free_bytes=9 * GIB, capability="8.9", driver="570.1"
    )
    monkeypatch.setattr(checks.machine, "gpus", lambda: [L4, busy])
    devices, found = checks.gpus()
    assert devices == [L4, busy] and found.status == "warn" and "GPU 1: 13.0 GiB" in found.advice


@pytest.mark.parametrize("folder", ["/proc", "gone"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, folder: str) -> None:
    found = checks.writing(tmp_path / folder)
    assert found.status == "fail" and found.line.startswith(str(tmp_path / folder))


def test_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    assert checks.writing(tmp_path).status == "ok" and not list(tmp_path.iterdir())


def test_little_space_warns_then_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SHM_WARN_GIB", 1e9)
    assert "--shm-size" in checks.shared_memory().advice
    monkeypatch.setattr(checks, "DISK_WARN_GIB", 1e9)
    assert {check.status for check in checks.disk(tmp_path / "not" / "yet")} == {"warn"}
    monkeypatch.setattr(checks, "DISK_FAIL_GIB", 1e9)
    assert {check.status for check in checks.disk(tmp_path)} == {"fail"}


@pytest.mark.parametrize(("answers", "status"), [(True, "ok"), (False, "warn")])
def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool, status: str) -> None:
    programs = {"sbatch": "echo slurm 23.11.4", "sinfo": "echo '4 idle'; echo '1 drain'" if answers else "exit 1"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = next(check for check in checks.schedulers() if check.name == "slurm")
    assert found.status == status and found.line.startswith("slurm 23.11.4")
    assert ("nodes: 4 idle, 1 drain" in found.line) == answers
