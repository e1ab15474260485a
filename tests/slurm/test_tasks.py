"""What the tasks of a job find around them on a real Slurm: their ranks, their nodes, and none of the submitting shell's secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from trebuchet.launcher.job import JobSpec
from trebuchet.slurm.sbatch import render
from trebuchet.slurm.site import build_site

from .cluster import SlurmCluster


def dump(slurm: SlurmCluster, folder: Path, job: str) -> str:
    """All that Slurm keeps of a job: its own answer, the script and the environment in the controller's spool."""
    kept = [file.read_bytes() for file in (slurm.root / "state").glob(f"hash.*/job.{job}/*")]
    assert len(kept) == 2
    return slurm.ask("scontrol", "show", "job", "--details", job) + b"\n".join(kept).decode(errors="replace")


def test_every_task_knows_its_rank_and_no_secret_is_kept(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes, two tasks and two GPUs each; the program writes down its environment. A token in the submitting shell stays there, one
    that is named by its file is in the ranks' environment and in nothing that Slurm keeps."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_shell")
    folder = tmp_path / "it's a $(run)"
    (folder / "logs").mkdir(parents=True)
    (tmp_path / "secret").write_text("wandb_from_a_file\n", encoding="utf-8")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\nenv -0 >"{tmp_path}/of-$RANK"\n', encoding="utf-8")
    program.chmod(0o755)
    settings = {
        "partition": "low", "time": "5", "python": str(program), "requeue": False,
        "secrets": {"WANDB_API_KEY": str(tmp_path / "secret")},
    }  # fmt: skip
    spec = JobSpec(
        name="tasks", run_folder=folder, module="any", arguments=(str(folder),), environment={"MINE": "it's $HOME"},
        nodes=2, tasks_per_node=2, gpus_per_node=2,
    )  # fmt: skip
    (folder / "job.sh").write_text(render(spec, build_site(settings, "test"), "python3", recorded=False))
    job = slurm.ask("sbatch", "--parsable", f"--chdir={folder}", str(folder / "job.sh")).strip()
    kept = dump(slurm, folder, job)
    said = folder / "logs" / "slurm.log"
    assert slurm.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED", said.read_text()
    tasks = [dict(line.split("=", 1) for line in file.read_text().rstrip("\0").split("\0"))
             for file in sorted(tmp_path.glob("of-*"))]  # fmt: skip
    assert [(t["RANK"], t["LOCAL_RANK"], t["NODE_RANK"]) for t in tasks] == [
        ("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1"),
    ]  # fmt: skip
    nodes = [t["SLURMD_NODENAME"] for t in tasks]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    for task in tasks:
        assert (task["WORLD_SIZE"], task["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("127.0.0.1", str(10000 + int(job) % 20000))
        assert task["TREBUCHET_NODES"] == f"{nodes[0]},{nodes[2]}"
        assert (
            task["SLURM_GPUS_ON_NODE"] == "2"
        )  # every task sees all GPUs of its node and takes the one of its local rank
        assert task["MINE"] == "it's $HOME" and task["WANDB_API_KEY"] == "wandb_from_a_file"
        assert "HF_TOKEN" not in task and task["TRITON_CACHE_DIR"].endswith("/triton")
    assert "hf_of_the_shell" not in kept and "wandb_from_a_file" not in kept
    assert f"WANDB_API_KEY=$(<{tmp_path}/secret)" in kept  # it is the right thing that was searched
