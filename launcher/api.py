"""The verbs from Python, and what the command line calls: plan, run, submit, resume.

    import trebuchet
    plan = trebuchet.plan({"model": "Qwen/Qwen2.5-7B-Instruct", "data": "train.jsonl"}, cluster="a100-80gb-8")
    trebuchet.run("train.yaml", overrides=["optimization.max_steps=10"])

`config` is a path, a mapping as in the YAML, or a `TrainConfig`. Deciding loads no torch; running loads it after every check
that can be made without it. Nothing is written before all checks have passed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import backends, prefetch, record
from .cluster import Cluster, load_cluster
from .config import build_config, dump_config, load_config
from .data_size import data_size
from .errors import JobFailed, NothingFits, RunError, SchedulerRefused, UserError
from .job import JobHandle, JobState
from .model_spec import load_model_spec
from .plan import Plan
from .planner import make_plan
from .replan import readable_by, replan
from .run_folder import RunFolder, new_run, open_run, require_disk
from .schema import TrainConfig
from .verify import Verdict
from .verify import verify as verify_run
from .way_out import with_way_out

if TYPE_CHECKING:
    from ..training.data import Prepared

ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | TrainConfig


def plan(config: ConfigLike, *, cluster: str | Cluster | None = None, overrides: Sequence[str] = ()) -> Plan:
    """Decides how to train; starts and writes nothing. A plan with `feasible=False` is returned, not raised."""
    wanted = checked(config, overrides, cluster if isinstance(cluster, str) else None)
    where = cluster if isinstance(cluster, Cluster) else load_cluster(wanted.cluster.name)
    size, model = data_size(wanted), load_model_spec(wanted.model)

    def decide(hardware: Cluster) -> Plan:
        return with_way_out(make_plan(wanted, model, hardware, examples=size.examples, tokens=size.tokens), size.tokens)

    if where.scheduler == "ray":  # how many ranks is a setting of the cluster there, and may be two numbers
        decided: Plan = backends.backend("ray").shaped(where, wanted.cluster.processes, decide)
        return decided
    return decide(where)


def checked(config: ConfigLike, overrides: Sequence[str], cluster: str | None) -> TrainConfig:
    """The configuration, checked, with the cluster that the command line names."""
    found = _config(config, overrides)
    named = {} if cluster is None else {"cluster": found.cluster.model_copy(update={"name": cluster})}
    return found.model_copy(update=named)


def run(config: ConfigLike, *, overrides: Sequence[str] = ()) -> JobHandle:
    """Trains on this machine, in the foreground, through accelerate. Raises JobFailed when the run fails or is stopped."""
    folder, decided = begin(config, overrides=overrides, here=True)
    return _finish(folder, decided)


def submit(config: ConfigLike, *, cluster: str | None = None, overrides: Sequence[str] = ()) -> JobHandle:
    """Hands the job to the cluster's scheduler and returns at once."""
    folder, decided = begin(config, cluster=cluster, overrides=overrides)
    handle: JobHandle = backends.of_plan(decided).submit(folder, decided)
    return handle


def resume(run: str, *, overrides: Sequence[str] = ()) -> JobHandle:
    """Goes on with a run from its newest valid checkpoint: here, or again in the queue of its scheduler. With its own plan, or with
    one made anew for other ranks or another layout, as `overrides` say."""
    folder, decided = resumable(run, overrides)
    if decided.cluster.scheduler == "local":
        return _finish(folder, decided)
    handle: JobHandle = backends.of_plan(decided).submit(folder, decided)
    return handle


def resumable(run: str, overrides: Sequence[str] = ()) -> tuple[RunFolder, Plan]:
    """An existing run that has ended early, and its plan, which `overrides` change for this attempt and those that follow."""
    folder = open_run(run)
    refuse_to_resume(folder)
    decided = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
    if overrides:
        decided = readable_by(replan(decided, overrides), folder)
        refuse_what_cannot_start(decided)
        record.write_atomically(folder.plan, decided.model_dump_json(indent=1) + "\n")
    return folder, decided


def verify(run: str, *, steps: int = 5) -> Verdict:
    """Replays steps from the last checkpoint of a run that is not running, and compares with the recorded losses."""
    folder = open_run(run)
    if waiting_or_running(folder):
        raise RunError(f"{folder.root} is {current_state(folder).value}; verify it when it has stopped.")
    return verify_run(folder, steps)


def begin(
    config: ConfigLike, *, cluster: str | None = None, overrides: Sequence[str] = (), here: bool = False
) -> tuple[RunFolder, Plan]:
    """Every check, then the run folder with train.yaml, plan.json and run.json: ready for a scheduler.

    `here`: the run is to be started on this machine, so a plan for another one's scheduler is refused.
    """
    wanted = checked(config, overrides, cluster)
    if wanted.sweep is not None:
        raise UserError(
            "this file describes a sweep: start it with `trebuchet sweep`, or one run of it with --set sweep=null."
        )
    folder = new_run(wanted.output)
    decided = plan(wanted)
    if not decided.feasible:
        raise NothingFits(nothing_fits(decided), decided)
    if here and decided.cluster.scheduler != "local":
        raise SchedulerRefused(
            f"{decided.cluster.name} is scheduled by {decided.cluster.scheduler}: use `trebuchet submit`, or plan for this machine "
            "with --set cluster=local."
        )
    refuse_what_cannot_start(decided)
    decided = decided.model_copy(update={"config": absolute(decided.config)})
    data = preflight(decided)
    require_disk(folder, disk_bytes(decided), "the run (checkpoints and the final model)")
    write(folder, decided, data)
    return folder, decided


def preflight(decided: Plan) -> Prepared | None:
    """Weights found, tokenizer opened, data read, rendered, tokenized, masked and checked; the workers find it cached.

    None on a login node without torch: the job does it in its first minute, before the ranks start. What needs a network is fetched
    all the same, because compute nodes have none.
    """
    if decided.cluster.scheduler != "local" and not can_read_data():
        prefetch.fetch(decided)
        return None
    refuse_missing_trackers(decided.config)
    from ..training import judge, load

    judge.check(decided.config.evaluation, decided.config.objective.name)
    folder = load.model_folder(decided.config.model, decided.model)
    return load.prepared_data(decided.config, decided.model, load.load_tokenizer(folder, decided.config.model))


def can_read_data() -> bool:
    """Whether what tokenizing needs is installed; asked without importing it."""
    return all(find_spec(name) for name in ("torch", "transformers", "datasets"))


def write(folder: RunFolder, decided: Plan, data: Prepared | None) -> None:
    """Beside, then renamed: a run folder exists whole or not at all."""
    beside = RunFolder(folder.root.with_name(f".{folder.root.name}.{os.getpid()}"))
    try:
        fill(beside, decided, data, run=folder.root.name)
        if folder.root.exists():
            folder.root.rmdir()  # it was empty when new_run looked; not empty any more is an error here
        os.rename(beside.root, folder.root)
    except OSError as error:
        raise RunError(f"the run folder {folder.root} could not be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(beside.root, ignore_errors=True)


def fill(folder: RunFolder, decided: Plan, data: Prepared | None, **facts: Any) -> None:
    """train.yaml, plan.json and run.json of a run that has not begun. `facts` go into the record as they are."""
    folder.root.mkdir(parents=True)
    folder.config.write_text(dump_config(decided.config), encoding="utf-8")
    folder.plan.write_text(decided.model_dump_json(indent=1) + "\n", encoding="utf-8")
    record.create(
        folder,
        command=record.command_line(),
        seed=decided.config.optimization.seed,
        model={"name": decided.model.name, "revision": decided.model.revision, "params": decided.model.params},
        data=data.report.to_dict() if data else None,
        **facts,
    )


def refuse_what_cannot_start(decided: Plan) -> None:
    chosen = decided.chosen
    assert chosen is not None
    backends.of_plan(decided).check(decided)


def refuse_missing_trackers(config: TrainConfig) -> None:
    """accelerate leaves out a tracker that is not installed, and says nothing when another one is there."""
    for name in config.tracking:
        if find_spec(name) is None:
            package = name.replace("_", "-")
            raise UserError(
                f"tracking: {name} is not installed; `pip install {package}`, or go without: --set tracking=[]."
            )


def refuse_to_resume(folder: RunFolder) -> None:
    state = current_state(folder)
    if waiting_or_running(folder):
        raise RunError(f"{folder.root} is {state.value}; follow it with `trebuchet logs -f {folder.root}`.")
    if state == JobState.SUCCEEDED:
        raise RunError(f"{folder.root} is finished; its model is in {folder.model}.")


def cancel(run: str) -> str:
    """Asks a run to save a checkpoint at the end of its step and stop; returns at once, with what will happen in words."""
    folder = open_run(run)
    if not waiting_or_running(folder):
        raise RunError(f"{run} is not running: it is {current_state(folder).value}.")
    words: str = backends.of_run(folder).cancel(folder)
    return words


def waiting_or_running(folder: RunFolder) -> bool:
    """Whether someone is about to train in this folder or does. PENDING alone is a run whose launcher never came that far."""
    state, found = current_state(folder), record.read(folder)
    return state == JobState.RUNNING or (state == JobState.PENDING and bool(found["submitted"] or found["attempts"]))


def nothing_fits(decided: Plan) -> str:
    from .plan_text import words

    reasons = "; ".join(r.reason for r in decided.rejected[-3:])
    ways = f"Nearest that fits: {words(decided.nearest)}. Smallest cluster: {words(decided.smallest_cluster)}."
    advice = " ".join(decided.advice)
    return f"nothing fits: {decided.model.name} on {decided.cluster.name}. {reasons}. {ways} {advice}".strip()


def disk_bytes(decided: Plan) -> int:
    """Checkpoints kept plus the one being written (weights and two moments in fp32 of what is trained), plus the final model."""
    chosen, config = decided.chosen, decided.config
    assert chosen is not None
    full = chosen.method == "full"
    trained = (
        decided.model.params
        if full
        else decided.model.lora_params(config.strategy.lora.r, config.strategy.lora.targets)
    )
    final = decided.model.params * 2 if full else trained * 4
    kept = config.checkpointing.keep + int(config.checkpointing.keep_best)
    return trained * 12 * (kept + 1) + final


def absolute(config: TrainConfig) -> TrainConfig:
    """Paths that exist made absolute, so that the run folder means the same from anywhere."""

    def path(text: str) -> str:
        there = Path(text).expanduser()
        return str(there.absolute()) if there.exists() else text

    def sources(items: Any) -> Any:
        return tuple(s.model_copy(update={"path": path(s.path)}) for s in items)

    data = config.data
    changes: dict[str, Any] = {"train": sources(data.train)}
    if not isinstance(data.eval, float):
        changes["eval"] = sources(data.eval)
    if data.chat_template:
        changes["chat_template"] = path(data.chat_template)
    return config.model_copy(
        update={
            "data": data.model_copy(update=changes),
            "model": config.model.model_copy(update={"name": path(config.model.name)}),
            "output": str(Path(config.output).expanduser().absolute()),
        }
    )


def current_state(folder: RunFolder) -> JobState:
    """The recorded state, after the record was brought up to date with what the run's scheduler knows."""
    backends.reconcile([folder])
    return JobState(record.read(folder)["state"])


def _finish(folder: RunFolder, decided: Plan) -> JobHandle:
    from . import local

    code = local.execute(folder, decided)
    if code != 0:
        found = record.read(folder)
        problem = JobFailed(
            found["error"] or f"stopped after step {found['step']}; go on with `trebuchet resume {folder.root}`."
        )
        problem.exit_code = code
        raise problem
    return JobHandle(run=folder.root.name, handle=record.read(folder)["attempts"][-1]["handle"], folder=folder.root)


def _config(config: ConfigLike, overrides: Sequence[str]) -> TrainConfig:
    if isinstance(config, TrainConfig):
        return build_config(config.model_dump(mode="json"), overrides) if overrides else config
    if isinstance(config, Mapping):
        return build_config(dict(config), overrides)
    return load_config(os.fspath(config), overrides)
