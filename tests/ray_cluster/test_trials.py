"""Trials over several nodes, a search that learns on Ray, and what a killed driver leaves: nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher import api, record
from trebuchet.launcher.cluster import Cluster, NodeGroup, load_cluster
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.sweep import open_sweep
from trebuchet.ray_cluster import clusters, rest, trials, tuning
from trebuchet.ray_cluster.state import ClusterFolder, cluster_folder

from .test_runs import wait_for
from .test_sweeps import groups_of, watchers

Config = Callable[..., dict[str, Any]]


def gpus(tmp_path: Path, **group: Any) -> str:
    values = {
        "nodes": 4,
        "gpus_per_node": 8,
        "gpu": "A100-80GB",
        "host_memory_gib": 512,
        "cores": 64,
        "inter_node_gbps": 25,
    }
    tree = {"scheduler": "ray", "groups": [values | group], "ray": {"provider": "local"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("model", "method", "ranks", "nodes", "at_once"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "full", 1, 1, 32),
        ("meta-llama/Llama-3.1-8B", "full", 2, 1, 16),
        ("meta-llama/Llama-3.1-70B", "full", 32, 4, 1),
    ],
)
def test_a_trial_takes_the_fewest_gpus_that_it_fits_on(
    rows_file: Path, tmp_path: Path, model: str, method: str, ranks: int, nodes: int, at_once: int
) -> None:
    """Ranks by the planner on 4 nodes of 8 GPUs with 80 GB; half of them do not fit."""
    config = {
        "model": model,
        "data": {"train": str(rows_file), "max_length": 2048},
        "strategy": {"method": method},
        "output": str(tmp_path / "sweep"),
    }
    asked: dict[int, bool] = {}

    def decide(cluster: Cluster) -> Plan:
        plan = api.plan(config, cluster=cluster.model_copy(update={"scheduler": "local"}))
        asked[cluster.gpus] = plan.feasible
        return plan

    decided = trials.shaped(load_cluster(gpus(tmp_path)), decide)
    assert asked.pop(ranks) and not any(asked.values()), asked
    assert decided.chosen is not None and decided.chosen.ranks == ranks
    assert (trials.nodes_of(decided), trials.at_once(decided)) == (nodes, at_once)
    bundles = trials.bundles(decided)
    assert len(bundles) == (1 if nodes == 1 else ranks) and len(asked) == (ranks - 1).bit_length()
    assert sum(one["GPU"] for one in bundles) == ranks and sum(one["CPU"] for one in bundles) == 8 * ranks


@given(st.integers(1, 16), st.integers(1, 16))
def test_a_share_of_a_node_leaves_the_others_theirs(per_node: int, wanted: int) -> None:
    """All shares of a node together are no more than the node."""
    taken = min(per_node, wanted)
    group = NodeGroup(
        nodes=3, gpus_per_node=per_node, gpu="X", gpu_memory_gib=24, host_memory_gib=96, host_reserved_gib=6, cores=64
    )
    share = trials.share(group, taken)
    fit = per_node // taken
    assert share.nodes == 1 and share.gpus_per_node == taken
    assert fit * share.cores <= 64 and fit * share.usable_host_gib <= group.usable_host_gib + 1e-6
    assert trials.doubled(per_node)[0] == 1 and trials.doubled(per_node)[-1] == per_node


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asha", "median"])
def test_only_the_poor_trial_is_ended_and_none_waits_for_another(ray_starts: None, name: str) -> None:
    """Ray's own rules with the settings of `stopping:`; a fifth trial waits for room, for which Ray's median rule would pause others."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    rule = tuning.stopper({"name": name, "grace": 0.25, "factor": 2})
    assert rule.set_search_properties("eval_loss", "min")
    *those, waiting = (Trial("x", stub=True) for _ in range(5))
    tune = SimpleNamespace(get_live_trials=lambda: [*those, waiting])
    said: dict[int, list[str]] = {}
    for percent in (10, 25, 50):
        for number, trial in enumerate(those):
            if percent == 10:
                rule.on_trial_add(tune, trial)
            loss = 9.0 if number == 3 else 2.0 - percent / 100 - number / 1000
            if TrialScheduler.STOP not in said.get(number, []):
                result = {"eval_loss": loss, "percent": percent, "training_iteration": percent}
                said.setdefault(number, []).append(rule.on_trial_result(tune, trial, result))
    assert said[3] == [TrialScheduler.CONTINUE, TrialScheduler.STOP]
    assert [said[number] for number in range(3)] == [[TrialScheduler.CONTINUE] * 3] * 3


def test_the_last_evaluation_is_told_when_the_model_is_there(tmp_path: Path) -> None:
    """At its last step a trial still exports its model, and must not be ended then, whatever a rule thinks of it."""
    rows = [{"step": step, "eval_loss": 1.0} for step in (5, 10, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tuning.evaluations(tmp_path / "metrics.jsonl", "eval_loss")
    assert [row["step"] for row in tuning.to_tell(found, 10)] == [5] and [row["step"] for row in found] == [5, 10]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ranks_on_two_nodes_a_search_that_learns_and_an_interrupt(
    ray_cluster: Path, with_settings: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """A trial whose two ranks are on two nodes. Ctrl+C in the command that shows the table: it saves, the one that waits is cancelled, and
    places and nodes are given back. The values of the second are Optuna's, when its turn comes."""
    pytest.importorskip("optuna", reason="searches need optuna: pip install 'trebuchet[sweep]'")
    changes = {
        "optimization.max_steps": 10**5, "optimization.warmup": 0, "optimization.global_batch_size": 4, "evaluation.every": 10**5,
        "evaluation.generations": 0, "checkpointing.every": 10**5, "tracking": [],
    }  # fmt: skip
    config = tiny_config(changes, output=str(tmp_path / "sweep"))
    config["sweep"] = {
        "space": {"optimization.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "method": "optuna", "trials": 2, "parallel": 1, "nodes": 2,
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    folder = cluster_folder(ray_cluster.stem)
    clusters.resize(ray_cluster.stem, 2)  # they come up while the command loads the model's files
    words = ["sweep", str(tmp_path / "s.yaml"), "--cluster", with_settings(), "--follow"]
    shown = tmp_path / "shown"
    with shown.open("w") as out:
        command = subprocess.Popen([sys.executable, "-m", "trebuchet.launcher.cli", *words], stdout=out, stderr=out)
    try:
        wait_for(lambda: open_sweep(str(tmp_path / "sweep")) is not None, 120, shown.read_text)
        sweep = open_sweep(str(tmp_path / "sweep"))
        assert sweep is not None and sweep.facts()["trials"][1] is None
        first, second = sweep.trials()
        wait_for(lambda: record.read(first)["step"] >= 2, 400, lambda: shown.read_text() + driver_log(folder))
        assert record.read(first)["attempts"][0]["world"] == 2
        ranks = [group for group in groups_of(folder) if len(group["bundles"]) == 2]
        assert len({bundle["node_id"] for group in ranks for bundle in group["bundles"]}) == 2, groups_of(folder)
        command.send_signal(signal.SIGINT)
        assert command.wait(120) == 1, shown.read_text()
    except BaseException:
        (tmp_path / "sweep" / "stop").touch()  # or its ranks train on beside all that is tested after this
        raise
    finally:
        command.kill()
    stopped = record.read(first)
    assert stopped["state"] == "CANCELLED" and (first.checkpoint(stopped["step"]) / "manifest.json").exists(), stopped
    wait_for(lambda: api.current_state(second).ended, 180, lambda: str(record.read(second)))
    assert record.read(second)["state"] == "CANCELLED" and not record.read(second)["attempts"]
    assert "trebuchet resume" in shown.read_text() and (sweep.root / "report.html").exists()
    clusters.resize(ray_cluster.stem, 2, at_most=True)
    wait_for(lambda: not watchers(sweep), 180, lambda: f"ranks to end: {watchers(sweep)}")
    wait_for(lambda: not groups_of(folder), 60, lambda: f"places: {groups_of(folder)}")
    wait_for(lambda: not clusters.nodes(folder), 90, lambda: f"idle nodes to end: {clusters.nodes(folder)}")
    from trebuchet.ray_cluster.trial_queue import TrialQueue

    sweep.stop.unlink()
    assert TrialQueue(sweep, [1]).suggest("any") == {"number": 1}
    drawn = sweep.facts()["trials"][1]["optimization.learning_rate"]
    assert json.loads(second.plan.read_text())["config"]["optimization"]["learning_rate"] == drawn


def driver_log(folder: ClusterFolder) -> str:
    dashboard = rest.of_cluster(folder)
    return "\n".join(dashboard.log(job)[-3000:] for job in dashboard.jobs())
