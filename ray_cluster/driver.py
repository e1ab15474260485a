"""The Ray job of a run: starts its ranks by Ray Train, lets it replace what fails, closes the record.

    python -m trebuchet.ray_cluster.driver RUN [--trial]         --trial: started by the job of a sweep, and not a job itself

Ray Train restarts the ranks as a group when one is lost and, in an elastic run, whenever the number of nodes changes; each time
they go on from the newest checkpoint, with the global batch of the plan. How often a failure is forgiven is decided here and in
ranks.py, by its class, and not by Ray's counters: those count a lost node like a wrong line of data. SIGTERM is a wish to save and stop;
tuning.py sends it to a trial that is not worth going on with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ..launcher import record, retry
from ..launcher.job import JobState
from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from . import lease, scheduler
from .ranks import STOPPED, kind_of, rank

RESIZE_LOOK_S = 2.0  # how often Ray Train looks whether an elastic run could be larger


def main(run: str, *, trial: bool = False) -> int:
    folder = RunFolder(Path(run))
    import ray

    # A job's ranks get its environment from Ray, and a process of a job's has to hand it on.
    plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
    given = {"env_vars": scheduler.job_spec(plan, folder).environment} if trial else None
    ray.init(address="auto", log_to_driver=False, namespace="trebuchet", runtime_env=given)
    signal.signal(signal.SIGTERM, lambda number, frame: folder.stop.touch())  # after init, which takes it for itself
    while True:
        plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
        words = fit(folder, plan)
        outcome = json.loads(folder.outcome.read_text(encoding="utf-8")) if folder.outcome.exists() else None
        if outcome is not None and kind_of(outcome) == "oom" and (next_plan := retry.lighter(plan)) is not None:
            go_on_lighter(folder, plan, next_plan, outcome["error"])
            continue
        return close(folder, outcome, words)


def go_on_lighter(folder: RunFolder, plan: Plan, next_plan: Plan, error: str) -> None:
    assert plan.chosen is not None and next_plan.chosen is not None
    how = f"Goes on with {retry.words(plan.chosen, next_plan.chosen)}, and the same global batch."
    record.update(folder, attempt={"kind": "oom"})
    record.end_attempt(folder, JobState.OUT_OF_MEMORY, 1, f"{error} {how}", goes_on=True)
    record.write_atomically(folder.plan, next_plan.model_dump_json(indent=1) + "\n")


def fit(folder: RunFolder, plan: Plan) -> str | None:
    """Ray Train from the first group of ranks to the last; its words when it gave up."""
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # TorchTrainer without its process group

    from .drain_watch import OFF, WatchFromTheHead

    os.environ.update(OFF)  # Ray Train hands its variables on to the controller
    chosen = plan.chosen
    assert chosen is not None
    trainer = DataParallelTrainer(
        rank,
        train_loop_config={
            "run": str(folder.root),
            "handle": record.read(folder)["submitted"],
            "restarts": scheduler.settings_of(plan).restarts,
            "gpu": chosen.device == "cuda",
        },
        scaling_config=ScalingConfig(
            num_workers=chosen.elastic or chosen.ranks,
            use_gpu=chosen.device == "cuda",
            resources_per_worker=scheduler.resources_of(plan),
            elastic_resize_monitor_interval_s=RESIZE_LOOK_S,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # v2's own, where the stub names v1's
            name=f"{folder.root.name}-{os.urandom(4).hex()}",  # the same name again would resume Ray's own state
            storage_path=str(folder.root / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[WatchFromTheHead()],  # type: ignore[list-item]  # any of Ray Train's own is taken
        ),
    )
    try:
        with lease.held(f"train-{trainer.train_run_context.run_id}"):
            trainer.fit()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no word'}"
    return None


def close(folder: RunFolder, outcome: dict[str, Any] | None, words: str | None) -> int:
    """The record's end by what the ranks left, or by Ray Train's words when they left nothing."""
    folder.stop.unlink(missing_ok=True)
    if outcome is None:
        outcome = {"exit_code": 1, "error": words or "the ranks ended without a word; their logs may say more"}
    code, error = outcome["exit_code"], outcome["error"]
    if code == 0:
        state = JobState.SUCCEEDED
    elif code == STOPPED:
        state, code = JobState.CANCELLED, 130
    else:
        state = JobState.OUT_OF_MEMORY if kind_of(outcome) == "oom" else JobState.FAILED
    if state not in (JobState.SUCCEEDED, JobState.CANCELLED):
        record.update(folder, attempt={"kind": kind_of(outcome)})
    attempts = record.read(folder)["attempts"]
    if attempts and attempts[-1]["ended"] is None:
        record.end_attempt(folder, state, code, error)
    else:
        record.update(folder, state=state.value, exit_code=code, error=error)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], trial="--trial" in sys.argv[2:]))
