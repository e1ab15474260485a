"""Without ray: settings, the shape of a run, classes of failures, what a record says of attempts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher import record
from trebuchet.launcher.cluster import CONFIGS, Cluster, NodeGroup, load_cluster
from trebuchet.launcher.errors import ClusterError, UserError
from trebuchet.launcher.plan import Chosen
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.ray_cluster import clusters, clusters_text, one_node, ranks, scheduler
from trebuchet.ray_cluster.settings import ray_settings
from trebuchet.ray_cluster.state import ClusterFolder, cluster_folder

OUT_OF_MEMORY = "out of memory: CUDA out of memory. Tried to allocate 2 GiB. Lower optimization.micro_batch."


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"idel_s": 3}, "ray.idel_s: unknown key; did you mean 'idle_s'"),
        ({"workers": [3, 1]}, "1 <= least <= most"),
        ({"workers": 0}, "at least 1"),
        ({"provider": "existing"}, "needs both"),
        ({"address": "a:1", "dashboard": "http://a:2"}, "belong to provider: existing"),
        ({"provider": "kubernetes"}, "ray.provider"),
    ],
)
def test_wrong_settings_are_named(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ClusterError) as raised:
        ray_settings(tree, "test")
    assert words in str(raised.value)


@pytest.mark.parametrize("name", [p.stem for p in CONFIGS.glob("ray-*.yaml")])
def test_shipped_clusters_are_right(name: str) -> None:
    clusters.of_ray(load_cluster(name))


def a_plan(**changes: Any) -> Chosen:
    values: dict[str, Any] = {
        "method": "full", "parallel": "none", "dp_replicate": 1, "dp_shard": 1, "offload": "none", "checkpointing": "none",
        "optimizer": "adamw", "precision": "fp32", "attention": "sdpa", "learning_rate": 1e-4, "micro_batch": 2, "accumulation": 8,
        "device": "cuda", "gpus": 1, "cost": None, "elastic": (1, 8), "time": {"tokens_per_s": None, "hours": None},
        "memory": {"peak_allocated_gib": 1, "process_gib": 1, "usable_gib": 2, "host_gib": 1, "components": {}},
    }  # fmt: skip
    return Chosen.model_validate(values | changes)


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 8), st.sampled_from(["none", "ddp", "fsdp2", "zero3"]))
def test_another_number_of_ranks_covers_the_same_global_batch(
    world: int, batch: int, micro: int, parallel: str
) -> None:
    """Enough micro-batches for all rows, and not one more on every rank than the fullest needs."""
    found = a_plan(micro_batch=micro, parallel=parallel, dp_shard=1 if parallel in ("none", "ddp") else 2).at_world(
        world, batch
    )
    assert found.ranks == world == found.gpus
    rows = found.micro_batch * found.accumulation * world
    assert rows >= batch and rows - found.micro_batch * world < batch
    assert (found.parallel == "none") == (world == 1 and parallel in ("none", "ddp"))


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        ({"exit_code": 0, "error": None, "node": None}, "done"),
        ({"exit_code": 75, "error": None, "node": None}, "stopped"),
        ({"exit_code": 2, "error": "train.jsonl line 3: not JSON", "node": None}, "input"),
        ({"exit_code": 1, "error": OUT_OF_MEMORY, "node": None}, "oom"),
        (
            {
                "exit_code": 1,
                "error": "another rank ended in the middle of a step, and this one waited for it",
                "node": None,
            },
            "node",
        ),
        ({"exit_code": 1, "error": "this allocation is not fit to train: n1: no GPU", "node": "n1"}, "node"),
        ({"exit_code": 1, "error": "FloatingPointError: loss nan", "node": None}, "program"),
    ],
)
def test_failures_have_the_classes_of_slurm(outcome: dict[str, Any], kind: str) -> None:
    assert ranks.kind_of(outcome) == kind


def test_only_failures_in_a_row_without_a_checkpoint_count() -> None:
    node, kept, resized = {"kind": "node"}, {"kind": "node", "kept": True}, {"kind": "resized"}
    assert ranks.in_vain([node, kept, node, resized, node]) == 2
    assert ranks.in_vain([node, {"kind": "oom"}]) == 0
    assert ranks.in_vain([]) == 0


def test_the_token_is_for_its_owner_and_names_stay_in_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path))
    folder = cluster_folder("mine")
    folder.create(provider="local")
    assert folder.token.stat().st_mode & 0o777 == 0o600 and folder.root.stat().st_mode & 0o777 == 0o700
    assert len(folder.token.read_text()) == 64 and folder.token.read_text() not in folder.facts.read_text()
    for name in ("../x", "a/b", "", "-x", "x" * 41):
        with pytest.raises(ClusterError):
            cluster_folder(name)
    with pytest.raises(ClusterError, match="not up"):
        ClusterFolder(tmp_path / "other").read()


def test_cluster_verbs_refuse_numbers_out_of_place() -> None:
    for action, nodes, at_most in (
        ("resize", None, False),
        ("up", 3, False),
        ("resize", -1, False),
        ("down", None, True),
    ):
        with pytest.raises(UserError, match="resize NAME NODES"):
            clusters_text.act(action, "ray-local", nodes, at_most=at_most, as_json=False)


def test_gpu_nodes_say_their_type_where_ray_finds_it_too() -> None:
    def cluster(gpu: str) -> Cluster:
        group = NodeGroup(nodes=1, gpus_per_node=8, gpu=gpu, gpu_memory_gib=79, host_memory_gib=512, cores=64)
        return Cluster(name="x", scheduler="ray", groups=(group,))

    assert clusters.resources(cluster("A100-80GB")) == {"CPU": 64, "GPU": 8, "accelerator_type:A100": 1}
    assert clusters.resources(cluster("RTX4090")) == {"CPU": 64, "GPU": 8}


def test_clients_load_no_ray() -> None:
    """Handing in a run and asking for its state works on a login node without ray."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from trebuchet.ray_cluster import scheduler, clusters_text, rest\n"
        "from trebuchet.launcher import cli\n"
        "print(cli.main(['cluster', 'status', 'ray-local']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2" and "is not up" in done.stderr, done.stderr


def test_resizing_writes_what_the_autoscaler_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path))
    cluster = load_cluster("ray-autoscaling")
    folder = cluster_folder(cluster.name)
    folder.create(provider="local")
    settings = clusters.of_ray(cluster)
    clusters.write_autoscaling(folder, cluster, settings, settings.min_nodes, clusters.most_nodes(cluster, settings))

    def limits() -> tuple[int, int]:
        import yaml

        worker = yaml.safe_load(folder.autoscaling.read_text())["available_node_types"]["worker"]
        return worker["min_workers"], worker["max_workers"]

    assert limits() == (0, 4)
    clusters.resize(cluster.name, 2)
    assert limits() == (2, 2)
    clusters.resize(cluster.name, 3, at_most=True)
    assert limits() == (0, 3)
    assert json.loads(folder.facts.read_text())["name"] == cluster.name


def test_a_trial_of_a_lost_node_is_started_again_until_it_was_in_vain_too_often(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record.write_atomically(folder.record, json.dumps({"state": "PENDING", "step": 0, "attempts": []}))
    assert one_node.close_lost(folder, 1)  # nothing was begun
    for expected in (True, False):
        record.begin_attempt(folder, "local://gone/1", ranks=1)
        assert one_node.close_lost(folder, 1) is expected
        assert record.read(folder)["attempts"][-1]["state"] == "NODE_FAIL"
    assert record.read(folder)["state"] == "NODE_FAIL" and "2 failures in a row" in record.read(folder)["error"]
    record.begin_attempt(folder, "local://here/2", ranks=1)
    (tmp_path / "logs").mkdir()
    assert not one_node.again(folder, {"exit_code": 1, "error": None}, 2)  # without a word: a third in vain
    assert one_node.again(folder, {"exit_code": 1, "error": None}, 3)
    record.write_atomically(folder.outcome, "{}")
    assert not one_node.again(folder, {"exit_code": 1, "error": "ValueError: shape", "node": None}, 9)


def a_trial(root: Path, *, begun: bool = True) -> RunFolder:
    folder = RunFolder(root / "trials" / "000")
    folder.logs.mkdir(parents=True)
    (root / "sweep.json").write_text("{}")
    facts = {
        "state": "PENDING",
        "step": 4,
        "attempts": [],
        "submitted": "ray://there/job",
        "exit_code": None,
        "error": None,
    }
    record.write_atomically(folder.record, json.dumps(facts))
    if begun:
        record.begin_attempt(folder, "local://there/1", ranks=1)
    return folder


@pytest.mark.parametrize("known", [None, {"status": "FAILED", "message": "SIGKILL"}, {"status": "SUCCEEDED"}])
def test_a_trial_that_was_not_worth_it_or_not_wanted_has_not_failed(
    tmp_path: Path, known: dict[str, Any] | None
) -> None:
    """Its driver was killed, or ended, before the trial could say that it has stopped; one that waited will never say it."""
    early, waiting, lost = a_trial(tmp_path / "a"), a_trial(tmp_path / "b", begun=False), a_trial(tmp_path / "c")
    record.update(early, not_worth_it=True)
    waiting.stop.touch()
    for folder in (early, waiting, lost):
        scheduler.close_if_ended(folder, "job", known)
    found = [record.read(folder) for folder in (early, waiting, lost)]
    assert [(one["state"], one["exit_code"], one["error"]) for one in found[:2]] == [("CANCELLED", 130, None)] * 2
    assert found[0]["attempts"][0]["state"] == "CANCELLED" and found[0]["attempts"][0]["ended"]
    assert found[2]["state"] == ("NODE_FAIL" if known is None else "FAILED") and "trebuchet resume" in found[2]["error"]


def test_to_cancel_one_waiting_trial_does_not_end_the_others(tmp_path: Path) -> None:
    """The job that its record names is the driver of the whole sweep."""
    trial = a_trial(tmp_path, begun=False)
    assert "when its turn comes" in scheduler.cancel(trial) and trial.stop.exists()


@pytest.mark.parametrize(
    ("outcome", "asked", "given"),
    [
        ({"exit_code": 75, "error": None}, False, True),  # saved at the end of its step
        (None, False, True),  # ended before it could listen
        ({"exit_code": 75, "error": None}, True, False),  # the user's own wish at the same moment
        ({"exit_code": 1, "error": "ValueError: shape", "node": None}, False, False),  # its own fault
    ],
)
def test_a_node_that_is_taken_back_is_no_failure(
    tmp_path: Path, outcome: dict[str, Any] | None, asked: bool, given: bool
) -> None:
    trial = a_trial(tmp_path)
    if outcome:
        record.write_atomically(trial.outcome, json.dumps(outcome))
    assert one_node.give_back(trial, {"exit_code": 1, "error": "no word", **(outcome or {}), "asked": asked}) is given
    found = record.read(trial)
    assert (found["state"], found["attempts"][0]["state"]) == (("PENDING", "PREEMPTED") if given else ("RUNNING",) * 2)
    assert ranks.in_vain(found["attempts"]) == 0


def test_a_python_in_a_folder_with_a_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own programs break on it one by one; nothing is started and nothing written."""
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.executable", "/opt/my tools/bin/python")
    with pytest.raises(ClusterError, match="a space in its name, and this Python is /opt/my tools/bin/python"):
        clusters.up(load_cluster("ray-local"))
    assert not (tmp_path / "cache").exists()


def test_a_cluster_starts_after_a_start_that_failed(tmp_path: Path) -> None:
    """Of which the head's last words stay, and neither its token nor what lay in its scratch folder."""
    folder, scratch = ClusterFolder(tmp_path / "mine"), tmp_path / "scratch"
    scratch.mkdir()
    folder.create(provider="local", scratch=str(scratch))
    folder.log.write_text("its last words")
    token = folder.token.read_text()
    folder.remove(keep_log=True)
    assert not folder.exists and [p.name for p in folder.root.iterdir()] == [folder.log.name] and not scratch.exists()
    folder.create(provider="local")
    assert folder.exists and folder.token.read_text() != token and folder.token.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):  # two that start it at once: one of them
        folder.create(provider="local")
