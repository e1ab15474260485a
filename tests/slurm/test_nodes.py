"""Nodes with something wrong, on a real Slurm: what the doctor says of them, and runs that go on without them.

The fault of a node is in the Python that it finds: another version first on its path, a clock that is wrong, a file system of its own
over a folder that the others share.
"""

from __future__ import annotations

import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import cli, record
from trebuchet.launcher.doctor import of_allocation, render
from trebuchet.slurm import doctor, states

from .cluster import SlurmCluster, wait_for
from .conftest import HERE
from .running import finish, run_job, said, submit
from .test_classify import NOT_LAUNCHED

pytestmark = pytest.mark.slow
Config = Callable[..., dict[str, Any]]
HERE_PYTHON = shlex.quote(sys.executable)
OWN_FILES = """unshare --mount --propagation private bash -c 'mount -t tmpfs tmpfs "$0" && mkdir -p "$1" && shift && exec "$@"'"""


@pytest.fixture
def faulty_python(tmp_path: Path) -> Callable[[dict[str, str]], str]:
    """A program that is this Python, but on some nodes begins with other shell lines."""

    def build(faults: dict[str, str]) -> str:
        cases = "".join(f"  {node}) {lines} ;;\n" for node, lines in faults.items())
        file = tmp_path / "bin" / "python"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f'#!/bin/bash\ncase $SLURMD_NODENAME in\n{cases}esac\nexec {HERE_PYTHON} "$@"\n', encoding="utf-8"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return str(file)

    return build


@pytest.fixture
def can_mount() -> None:
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def faults_of(
    slurm: SlurmCluster, cluster_file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What the doctor finds wrong with four nodes. They are idle before: one that still ends a job would keep its own waiting."""

    def ask(python: str, **settings: Any) -> list[str]:
        wait_for(
            lambda: slurm.ask("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "4", 60, "idle nodes"
        )
        capsys.readouterr()
        assert cli.main(["doctor", "--cluster", cluster_file(nodes=4, python=python, **settings)]) == 1
        shown = capsys.readouterr().out
        assert "not fit to train" in shown
        return [line.split(None, 2)[2] for line in shown.splitlines() if line.startswith("FAIL")]

    return ask


def test_the_doctor_names_each_faulty_node(
    can_mount: None,
    faults_of: Callable[..., list[str]],
    faulty_python: Callable[[dict[str, str]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """n2 has another peft, n3 a wrong clock, n4 a run folder of its own; all of it is said at once, and of nobody else."""
    old = tmp_path / "old" / "peft-0.0.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n", encoding="utf-8")
    (tmp_path / "late").mkdir()
    shift = "import time\nright = time.time\ntime.time = lambda: right() + 400\n"
    (tmp_path / "late" / "sitecustomize.py").write_text(shift, encoding="utf-8")
    own = tmp_path / "here"
    own.mkdir()
    python = faulty_python(
        {
            "n2": f"export PYTHONPATH={tmp_path}/old:$PYTHONPATH",
            "n3": f"export PYTHONPATH={tmp_path}/late:$PYTHONPATH",
            "n4": f'exec {OWN_FILES} {own} "${{@: -1}}" {HERE_PYTHON} "$@"',
        }
    )
    monkeypatch.chdir(own)
    faults = faults_of(python)
    assert len(faults) == 3, faults
    assert any(line.startswith("n2: peft 0.0.1, and ") for line in faults)
    assert any(line.startswith("n3 (rank 2): its clock is +") for line in faults)
    assert any(line.startswith("n4: the run folder: this node does not see") for line in faults)


def test_the_doctor_names_nodes_whose_ranks_never_come(
    faults_of: Callable[..., list[str]],
    faulty_python: Callable[[dict[str, str]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On n2 and n3 the program hangs before its first line. Both are named, the others not."""
    monkeypatch.chdir(tmp_path)
    python = faulty_python({"n2": "exec sleep 600", "n3": "exec sleep 600"})
    faults = faults_of(python, environment={**HERE, "TREBUCHET_ROLL_CALL_S": "12"})
    assert [fault.partition(":")[0] for fault in faults] == ["n2", "n3"], faults
    assert all("did not come within 12 s" in fault for fault in faults)


def test_the_doctor_names_a_node_whose_daemon_answers_nobody(
    slurm: SlurmCluster, faults_of: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon of n2 stops between the allocation and the start of its rank: srun's words or the roll call, whichever is first. The
    batch script, which is on the first node, waits for that; a daemon that stops earlier keeps the job in the queue."""
    monkeypatch.chdir(tmp_path)
    begun = states.call
    here, stopped = tmp_path / "here", tmp_path / "stopped"

    def call(*words: str, **options: Any) -> str:
        said = begun(*words, **options)
        if words[0] == "sbatch":
            wait_for(here.exists, 180, "an allocation")
            slurm.processes["n2"].send_signal(signal.SIGSTOP)
            stopped.touch()
        return said

    monkeypatch.setattr(states, "call", call)
    wait = f"touch {shlex.quote(str(here))}; until [ -e {shlex.quote(str(stopped))} ]; do sleep 0.1; done"
    try:
        faults = faults_of(sys.executable, environment={**HERE, "TREBUCHET_ROLL_CALL_S": "12"}, setup=[wait])
    finally:
        slurm.processes["n2"].send_signal(signal.SIGCONT)
    assert [fault.partition(":")[0] for fault in faults] == ["n2"], faults
    wait_for(lambda: slurm.ask("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "4", 180, "idle nodes")


def test_waiting_in_the_queue_is_said(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is held, and cancelled once the word was said: no report, and no wait without an end."""
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.0)
    job = slurm.ask("sbatch", "--parsable", "--hold", "-p", "low", "--wrap", "true").strip()
    waiting = states.states

    def cancelled_when_said(jobs: list[str]) -> Any:
        if "waits in the queue for these nodes: JobHeldUser; Ctrl+C gives up" in capsys.readouterr().err:
            slurm.ask("scancel", job)
        return waiting(jobs)

    monkeypatch.setattr(states, "states", cancelled_when_said)
    assert doctor.wait(job, tmp_path) is None


def test_what_srun_says_of_a_node_that_does_not_answer(tmp_path: Path) -> None:
    """Where the first node itself is the one, no rank can report: the words of srun are the report, before Slurm gives the node up."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm.log").write_text(NOT_LAUNCHED, encoding="utf-8")
    found = doctor.wait("1", tmp_path)
    assert found == {"problems": ["n2: Slurm could not start its ranks: Socket timed out on send/recv operation"]}
    assert of_allocation(found).exit_code == 1 and "FAIL  fault  n2: Slurm" in render(of_allocation(found))


def test_a_node_that_cannot_read_the_model_is_left_out(
    slurm: SlurmCluster,
    can_mount: None,
    cluster_file: Callable[..., str],
    faulty_python: Callable[[dict[str, str]], str],
    tiny_config: Config,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Before a model is loaded: n2 sees an empty folder in its place. The job goes back to the queue without n2 and ends elsewhere."""
    python = faulty_python({"n2": f'exec {OWN_FILES} "{tiny_model}" "{tiny_model}" {HERE_PYTHON} "$@"'})
    few = {"optimization.max_steps": 2, "evaluation.generations": 0}
    cluster = cluster_file(nodes=2, python=python, nodelist=[])
    run = submit(tiny_config(few, output=str(tmp_path / "run"), cluster={"name": cluster, "processes": 1}), cluster)
    finish(run)
    found = record.read(run)
    assert found["state"] == "SUCCEEDED", said(run)
    first, last = found["attempts"]
    assert (
        first["kind"] == "node"
        and "n2 (rank 1): the model: " in first["reason"]
        and "Goes on without n2." in first["reason"]
    )
    assert "n2" in first["nodes"] and "n2" not in last["nodes"]
    assert "ExcNodeList=n2" in slurm.ask("scontrol", "show", "job", run_job(run))
