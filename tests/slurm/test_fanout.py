"""Arrays on a real Slurm: one job, many items, one table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import api, cli, data_verbs, worker
from trebuchet.slurm.fanout import fan_out, gather, write_table
from trebuchet.slurm.site import build_site

from .cluster import SlurmCluster
from .running import submissions

Config = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_one_array_and_one_table(slurm: SlurmCluster, tmp_path: Path) -> None:
    """math.sqrt of 12 numbers, one of them impossible: 11 results, one error, one job id, at most 4 at a time."""
    site = build_site({"partition": "low", "time": "5"}, "test")
    numbers = [float(i * i) for i in range(11)] + [-1.0]
    jobs = fan_out(math.sqrt, numbers, site=site, folder=tmp_path / "array", name="roots", parallel=4)
    assert len({job.job_id.partition("_")[0] for job in jobs}) == 1
    shown = slurm.ask("scontrol", "show", "job", jobs[0].job_id.partition("_")[0])
    assert "ArrayTaskThrottle=4" in shown and "JobName=roots" in shown
    rows = gather(jobs)
    assert [row["result"] for row in rows[:11]] == list(range(11))
    assert rows[11]["result"] is None and "ValueError" in rows[11]["error"]
    table = write_table(rows, tmp_path / "table.jsonl")
    assert [json.loads(line) for line in table.read_text().splitlines()] == rows


@pytest.mark.slow
def test_a_thousand_items_are_one_call(slurm: SlurmCluster, tmp_path: Path) -> None:
    site = build_site({"partition": "low", "time": "5", "extra": ["--hold"]}, "test")
    jobs = fan_out(math.sqrt, range(1000), site=site, folder=tmp_path, name="many")
    slurm.ask("scancel", jobs[0].job_id.partition("_")[0])
    assert {job.job_id.partition("_")[0] for job in jobs} == {jobs[0].job_id.partition("_")[0]} and len(jobs) == 1000


@pytest.mark.slow
def test_parts_of_the_data_are_jobs_and_put_together_here(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two tasks make the blocks of both sources; what they leave is the entries that one process makes. Tasks that end before they
    begin are named, and their work is done here."""
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(tiny_config()), encoding="utf-8")
    cache = tmp_path / "cache" / "data"
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path / "alone"))
    alone = data_verbs.prepare(str(config))
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path / "cache"))
    assert data_verbs.prepare_on(cluster_file(), str(config), 2) == []
    assert sorted(path.name[-2:] for path in cache.glob("*-0")) == ["-0", "-0"]  # a block of each source
    together = data_verbs.prepare(str(config))
    assert together["fingerprint"] == alone["fingerprint"] and not list(cache.glob("*-0"))

    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path / "third"))
    words = ["data", "prepare", str(config), "--shards", "2", "--cluster", cluster_file(setup=["exit 3"])]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "cached for the runs that follow" in said.out
    failed = [line for line in said.err.splitlines() if line.startswith("part ")]
    assert len(failed) == 2 and all("ended without a result" in line and "made here" in line for line in failed)


@pytest.mark.slow
def test_many_finished_runs_are_asked_by_one_array(
    slurm: SlurmCluster, cluster_file: Callable[..., str], tiny_config: Config, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`trebuchet eval` of two runs on the nodes: what each found of itself when it ended, in one table; one that lacks its weights is a
    row with its reason."""
    few = {
        "optimization.max_steps": 2,
        "evaluation.generations": 0,
        "evaluation.forgetting": 0,
        "checkpointing.every": 100,
    }
    runs = [tmp_path / "runs" / name for name in ("it's one", "two", "three")]
    for number, run in enumerate(runs[:2]):
        folder, plan = api.begin(tiny_config({**few, "optimization.seed": number}, output=str(run)))
        folder.logs.mkdir()
        assert worker.train(folder, plan)
    said = [json.loads((run / "evaluation.json").read_text()) for run in runs[:2]]
    shutil.copytree(runs[0], runs[2])
    (runs[2] / "model" / "model.safetensors").unlink()
    before = submissions(slurm)
    assert cli.main(["eval", *map(str, runs), "--cluster", cluster_file()]) == 1
    assert submissions(slurm) - before == 1
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == list(map(str, runs))
    for row, figures in zip(rows[:2], said, strict=True):
        assert row["error"] is None
        for when in ("before", "after"):  # plain transformers against the kernel layer's sums, fp32
            assert row[when]["loss"] == pytest.approx(figures[when]["loss"], rel=1e-4)
    assert rows[2]["after"] is None and "model.safetensors" in rows[2]["error"] and rows[2]["error"] in shown.out
    assert "3 evaluations are slurm://" in shown.err
    assert json.loads((runs[1] / "run.json").read_text())["evaluation"]["verdict"] == rows[1]["verdict"]


def test_parts_go_where_they_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("model: m\ndata: d.jsonl\n")
    for words, says in (
        (["--shards", "2"], "--shards N goes with --cluster NAME, or with --shard I"),
        (["--cluster", "rtx4090-1"], "--shards N goes with --cluster NAME, or with --shard I"),
        (["--shards", "2", "--cluster", "rtx4090-1"], "not sent to the scheduler 'local', but to: slurm, ray"),
    ):
        assert cli.main(["data", "prepare", str(config), *words]) in (2, 4)
        assert says in capsys.readouterr().err


def test_more_than_one_array_holds_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="one array holds 1 to 1000"):
        fan_out(math.sqrt, range(1001), site=build_site({}, "test"), folder=tmp_path, name="many")
