"""The job script as text: whole files against golden ones, shells' own checkers, hostile names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trebuchet.launcher.job import JobSpec
from trebuchet.slurm.sbatch import Array, directives, render
from trebuchet.slurm.site import build_site

GOLDEN = Path(__file__).parent / "golden"
PYTHON = "/shared/venv/bin/python"
HOSTILE = (
    "a b", "it's", 'say "x"', "$(touch pwned)", "`touch pwned`", "two\nlines", "naïve-日本", "100%j", "back\\slash", "-x",
    "a;b&c|d>e", "#x", "*",
)  # fmt: skip


def spec(folder: str = "/shared/runs/demo", **changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "name": Path(folder).name,
        "run_folder": Path(folder),
        "module": "trebuchet.launcher.worker",
        "arguments": (folder,),
        "environment": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "16"},
        "nodes": 2,
        "tasks_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_task": 16,
    }
    return JobSpec(**values | changes)


ARRAYS = {"array": Array("0-7,9", 4), "hostile-array": Array("3", 1)}
CASES: dict[str, tuple[JobSpec, dict[str, Any]]] = {
    "plain": (spec(), {}),
    "cpu": (spec(nodes=1, tasks_per_node=2, gpus_per_node=0, cpus_per_task=1), {"partition": "cpu", "requeue": False}),
    "site": (
        spec(),
        {
            "account": "my-project", "partition": ["a100", "h100"], "qos": "normal", "constraint": "nvlink|ib",
            "reservation": "course", "exclude": ["n013", "n014"], "time": "24:00:00", "memory": "480G", "exclusive": True,
            "gpu_request": "gres", "gpu_type": "a100", "modules": ["cuda/12.8"], "venv": "~/my env",
            "environment": {"NCCL_SOCKET_IFNAME": "ib0"}, "secrets": {"WANDB_API_KEY": "~/.secrets/wandb"},
            "cache": "/shared/cache", "node_local": "/scratch", "warning_s": 300,
            "extra": ["--gres-flags=enforce-binding", "--comment=ours, not yours"], "srun": ["--mpi=none"],
        },
    ),
    "pyxis": (spec(), {"container": {"image": "images.example#nvidia/pytorch:26.01-py3", "mounts": ["/shared:/shared"]}}),
    "apptainer": (
        spec(),
        {"container": {"runtime": "apptainer", "image": "/shared/images/torch 2.sif", "mounts": ["/shared", "/d:/d:ro"]}},
    ),
    "array": (spec("/shared/runs/sweep", environment={"WANDB_RUN_ID": "sweep-1"}), {"partition": "gpu"}),
    "hostile-array": (spec("/runs/100% it's"), {}),
    "hostile": (spec("/runs/$(touch pwned)\nit's \"x\" 100%j"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whole_script(name: str) -> None:
    """UPDATE_GOLDEN=1 rewrites the files; look at the difference before committing it."""
    job, site = CASES[name]
    text = render(job, build_site(site, "test"), PYTHON, array=ARRAYS.get(name))
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_shells_find_nothing(name: str, tmp_path: Path) -> None:
    script = GOLDEN / f"{name}.sh"
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3).map("/".join))
@example("a'b\"c$(touch pwned)`x`\\\n\t日本%j#")
def test_names_reach_the_rank_as_they_are(name: str) -> None:
    """The part of the script that needs no Slurm, run by bash: the folder is what it was, and nothing in it is executed."""
    folder = "/nonexistent/" + name
    text = render(spec(folder, environment={"MINE": name}), build_site({"environment": {"SITE": name}}, "test"), PYTHON)
    lines = (
        text.split("\n# The ranks know")[0].replace('cd "$run" || exit 1', "").replace("exec >>logs/slurm.log 2>&1", "")
    )
    script = lines + '\nprintf "%s\\0" "$run" "$MINE" "$SITE"\n'
    done = subprocess.run(["bash"], input=script.encode(), capture_output=True)
    assert done.stdout.decode().split("\0")[:3] == [folder, name, name] and not done.stderr
    assert not Path("pwned").exists()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_a_directive_is_one_line(name: str) -> None:
    for line in directives(spec("/runs/" + name.replace("/", "_"), name=name), build_site({}, "test")):
        assert not any(ord(c) < 32 for c in line)


def test_no_secret_and_no_trace() -> None:
    job, site = CASES["site"]
    text = render(job, build_site(site, "test"), PYTHON)
    assert "WANDB_API_KEY=$(<~/.secrets/wandb)" in text
    assert "set -x" not in text and "--export=NONE" in text


def test_ranks_are_numbered_in_the_task() -> None:
    """SLURM_PROCID is 0 on the batch host; outside of the single quotes every rank would be rank 0."""
    text = render(spec(), build_site({}, "test"), PYTHON)
    before, task, after = text.partition("task='")
    inside, _, rest = task and after.partition("'\n")
    assert "SLURM_PROCID" not in before.replace(
        "# Each task expands this itself: on the batch host SLURM_PROCID is 0", ""
    )
    assert "RANK=$SLURM_PROCID" in inside and "SLURM_PROCID" not in rest and "torchrun" not in text


def test_the_tasks_of_an_array_are_runs_of_their_own() -> None:
    array = Array("0-999", 50)
    lines = directives(spec("/shared/runs/sweep"), build_site({}, "test"), array=array)
    assert "--array=0-999%50" in lines and "--output=/shared/runs/sweep/trials/%3a/logs/slurm.log" in lines
    text = render(spec("/shared/runs/sweep"), build_site({}, "test"), PYTHON, array=array)
    assert "$SLURM_JOB_ID" not in text.partition("facts()")[2]  # the id of one task is that of the whole array
