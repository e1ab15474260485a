"""A real Ray cluster whose head and nodes are jobs of a real Slurm: grows on demand, replaces what is lost, leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from trebuchet.launcher import api, record
from trebuchet.launcher.cluster import Cluster, NodeGroup, load_cluster
from trebuchet.launcher.errors import ClusterError
from trebuchet.launcher.job import JobState
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.ray_cluster import clusters, rest
from trebuchet.ray_cluster.state import ClusterFolder, cluster_folder
from trebuchet.slurm import ray_jobs
from trebuchet.slurm.site import build_site

from .cluster import SlurmCluster, wait_for
from .conftest import HERE

Config = Callable[..., dict[str, Any]]


def a_folder(root: Path) -> ClusterFolder:
    folder = ClusterFolder(root / "it's a $(cluster)")
    folder.create(provider="slurm", object_store_bytes=10**8)
    folder.write(address="10.0.0.1:6379")
    return folder


def test_scripts_hold_what_a_shell_cannot_misread(tmp_path: Path) -> None:
    """`bash -n` and shellcheck are content, and neither the token nor an unquoted path is in them."""
    folder = a_folder(tmp_path)
    site = build_site({"partition": "gpu", "time": "60", "environment": {"A": "b $c"}}, "test")
    group = NodeGroup(nodes=2, gpus_per_node=2, gpu="X", gpu_memory_gib=24, host_memory_gib=64, cores=8)
    node = ray_jobs.render_node(
        folder, group, site, "/usr/bin/py thon", "worker-1", {"CPU": 8, "GPU": 2, "accelerator_type:X": 1}
    )
    for script in (ray_jobs.render_head(folder, site, "/usr/bin/py thon"), node):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
        if shutil.which("shellcheck"):
            checked = subprocess.run(["shellcheck", "-"], input=script, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stdout
        assert folder.token.read_text() not in script
        assert "#SBATCH --no-requeue" in script and "--signal" not in script
    assert "#SBATCH --gpus-per-node=2" in node and "--num-gpus=2" in node and "--num-cpus=8" in node


def test_what_a_killed_job_left_goes_with_the_next_one_of_its_node(tmp_path: Path) -> None:
    """Of a job that lives it stays, and so does what is not of a job at all, and a link. A job that ends takes its own."""
    start = "{\n" + ray_jobs.SCRATCH + "}\n"
    plain, link = (Path("/tmp/tr-" + secrets.token_hex(3)) for _ in range(2))
    plain.mkdir()
    link.symlink_to(tmp_path)
    (tmp_path / "lock").touch()
    script = start + 'echo "$scratch"; read -r _'  # lives until its input ends
    jobs = [subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        alive, killed = (Path(job.stdout.readline().decode().strip()) for job in jobs if job.stdout)
        assert alive.is_dir() and (killed / "lock").is_file()
        jobs[1].kill()
        jobs[1].wait()
        assert killed.is_dir()
        ended = subprocess.run(["bash", "-c", start + 'echo "$scratch"'], capture_output=True, text=True, check=True)
        assert ended.stderr == "" and not Path(ended.stdout.strip()).exists()
        assert not killed.exists() and (alive / "lock").is_file() and plain.is_dir() and link.is_symlink()
        jobs[0].communicate(b"", timeout=60)
        assert not alive.exists()
    finally:
        link.unlink()
        plain.rmdir()
        for job in jobs:
            job.kill()
            job.communicate()


def test_a_container_is_refused() -> None:
    with pytest.raises(ClusterError, match="containers"):
        ray_jobs.site_of({"partition": "gpu", "container": {"image": "x.sif", "runtime": "apptainer"}}, "test")


@pytest.fixture
def ray_on_slurm(ray_starts: None, slurm: SlurmCluster, tmp_path: Path) -> Iterator[Cluster]:
    tree = {
        "scheduler": "ray",
        "groups": [{"nodes": 3, "host_memory_gib": 16, "cores": 1}],
        "ray": {"provider": "slurm", "idle_s": 6, "workers": 2},
        "slurm": {"partition": "low", "time": "10", "environment": HERE},
    }
    path = tmp_path / f"ray-slurm-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    cluster = load_cluster(str(path))
    clusters.up(cluster, lambda line: None)
    try:
        yield cluster
    finally:
        if cluster_folder(cluster.name).exists:
            clusters.down(cluster.name, lambda line: None)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 90 s on an idle machine of two cores
def test_nodes_come_are_replaced_and_go(
    slurm: SlurmCluster, ray_on_slurm: Cluster, tiny_config: Config, tmp_path: Path
) -> None:
    """A run of two ranks brings two jobs. A third that nobody works on ends while the run goes on. One of the two is told to go, as by
    preemption: the ranks save before it does, it is replaced, and not a step is lost. The driver is killed with -9: its nodes end, long
    before Ray Train's own request would (180 s). After `down` the queue is empty."""
    folder = cluster_folder(ray_on_slurm.name)
    assert list(ray_jobs.jobs(folder)) == [folder.read()["head_job"]]
    changes = {
        "optimization.max_steps": 10**5, "optimization.global_batch_size": 16, "optimization.micro_batch": 1, "data.packing": False,
        "evaluation.every": 10**5, "evaluation.generations": 0, "checkpointing.every": 1000, "data.eval": 0, "tracking": [],
    }  # fmt: skip
    path = str(tmp_path / f"{ray_on_slurm.name}.yaml")
    run = RunFolder(api.submit(tiny_config(changes, output=str(tmp_path / "run")), cluster=path).folder)
    wait_for(lambda: record.read(run)["step"] >= 3, 400, lambda: f"step 3; {record.read(run)}")
    nodes = nodes_of(folder)
    assert len(nodes) == 2
    assert places_of_others(folder) == {n["node_id"] for n in rest.of_cluster(folder).nodes() if n["is_head_node"]}
    scratch = [path for path in Path("/tmp").glob("tr-??????") if (path / "lock").is_file()]
    assert len(scratch) >= 3 and not any(
        path.stat().st_mode & 0o077 for path in scratch
    )  # Ray opens its own to everybody
    clusters.resize(folder.name, 3)
    wait_for(lambda: len(clusters.nodes(folder)) == 3, 180, lambda: f"a third node; {ray_jobs.jobs(folder)}")
    clusters.resize(folder.name, 3, at_most=True)
    wait_for(
        lambda: nodes_of(folder).keys() == nodes.keys(), 180, lambda: f"it to end, and no other; {nodes_of(folder)}"
    )
    lost = next(iter(nodes))
    slurm.ask("scancel", "--signal=TERM", lost)  # the notice of a preemption; the node then has DRAIN_S
    wait_for(lambda: len(record.read(run)["attempts"]) > 1, 400, lambda: f"a second attempt; {record.read(run)}")
    there = record.read(run)["attempts"][1]["first_step"]
    wait_for(lambda: record.read(run)["step"] >= there + 2, 400, lambda: f"more steps; {record.read(run)}")
    wait_for(lambda: lost not in nodes_of(folder) and len(nodes_of(folder)) == 2, 180, lambda: f"{nodes_of(folder)}")
    words = {"trebuchet.ray_cluster.driver", str(run.root)}
    next(p for p in psutil.process_iter(["cmdline"]) if words <= set(p.info["cmdline"] or ())).kill()
    wait_for(lambda: not nodes_of(folder), 90, lambda: f"nodes of a dead driver to end; {ray_jobs.jobs(folder)}")
    assert api.current_state(run) == JobState.FAILED
    found = record.read(run)
    assert f"trebuchet resume {run.root}" in found["error"], found
    first, second = found["attempts"][:2]
    assert first["kind"] == "drained" and first["state"] == JobState.PREEMPTED, found["attempts"]
    assert second["first_step"] == first["last_step"] > 0, found["attempts"]
    clusters.down(ray_on_slurm.name, lambda line: None)
    assert slurm.ask("squeue", "-h", "-o", "%j").split().count(ray_jobs.job_name(folder)) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_shipped_file_starts_as_it_is_and_nothing_outlives_its_head(ray_starts: None, slurm: SlurmCluster) -> None:
    """In the partition that it names. The head's job is killed with its script, as by a node that fails: a node's job ends itself."""
    name = "ray-on-slurm"
    clusters.up(load_cluster(name), lambda line: None)
    folder = cluster_folder(name)
    try:
        assert (shown := clusters.status(load_cluster(name)))["up"] and shown["most"] == 4
        head = folder.read()["head_job"]
        clusters.resize(name, 1)
        wait_for(lambda: bool(clusters.nodes(folder)), 120, lambda: f"a node; {ray_jobs.jobs(folder)}")
        assert clusters.nodes(folder)[0]["resources"]["GPU"] == 4
        slurm.ask("scancel", "--full", "--signal=KILL", head)
        wait_for(lambda: not ray_jobs.jobs(folder), 120, lambda: f"an empty queue; {ray_jobs.jobs(folder)}")
    finally:
        clusters.down(name, lambda line: None)
    assert not folder.root.exists()


def places_of_others(folder: ClusterFolder) -> set[str]:
    """The nodes of all actors that are no ranks: one of them on a node that has no rank would keep it from ending."""
    found = rest.of_cluster(folder).ask("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
    others = [row for row in found if row["state"] == "ALIVE" and row["class_name"] != "RayTrainWorker"]
    assert [row["class_name"] for row in others].count("PreemptionWatcher") == 1, found
    return {row["node_id"] for row in others}


def nodes_of(folder: ClusterFolder) -> dict[str, str]:
    return {job: comment for job, (_, comment) in ray_jobs.jobs(folder).items() if comment.startswith("worker-")}
