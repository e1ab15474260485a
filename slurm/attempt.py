"""Around the ranks of one attempt, on the job's first node: opens and closes the attempt in the record, says what
follows.

    python -m trebuchet.slurm.attempt begin RUN                              before the ranks; facts on stdin
    python -m trebuchet.slurm.attempt end RUN STATUS WARNING_S RESTARTS      after them; prints `requeue`,
    `avoid NODES` or `exit CODE`

Reads what Slurm knows from stdin, because inside a container there is no scontrol; the script outside calls it. Reads
the plan as plain JSON: pydantic would double the time that the job takes around its ranks. Left out: the rules
(classify.py).
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..launcher import record, sweep_budget
from ..launcher.errors import TrebuchetError
from ..launcher.job_state import JobState
from ..launcher.run_folder import RunFolder
from . import classify

if TYPE_CHECKING:
    from ..launcher.plan import Plan

RESERVE_BYTES = 256 * 1024


def begin(folder: RunFolder, facts: classify.Facts) -> int:
    """Closes an attempt that ended without a word, opens this one; checks the data where the login node could not."""
    found = record.read(folder)
    if found["attempts"] and found["attempts"][-1]["ended"] is None:
        close_silent(folder, found["attempts"][-1], facts)
    folder.outcome.unlink(missing_ok=True)
    folder.reserve.write_bytes(os.urandom(RESERVE_BYTES))  # of bytes that a file system cannot compress away
    plan = json.loads(folder.plan.read_text(encoding="utf-8"))
    handle = f"slurm://{plan['cluster']['name']}/{job_id(facts)}"
    record.begin_attempt(folder, handle, ranks=0)
    log = folder.scheduler_log
    record.update(
        folder,
        submitted=handle,
        attempt={
            "first_step": newest_step(folder),
            "nodes": list(facts.allocated),
            "log_from": log.stat().st_size if log.exists() else 0,
        },
    )
    if (root := sweep_budget.sweep_of(folder)) and (why := sweep_budget.used_up(root)):
        record.update(folder, left_out=why)
        record.end_attempt(folder, JobState.CANCELLED, 130, why)
        return 130
    if folder.stop.exists():  # cancelled while it waited
        folder.stop.unlink()
        record.end_attempt(folder, JobState.CANCELLED, 130, None)
        return 130
    if found["data"] is None:
        return prepare_data(folder)
    return 0


def job_id(facts: classify.Facts) -> str:
    """As users name it: a task of an array by its array and its index."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", facts.job)


def prepare_data(folder: RunFolder) -> int:
    """What submit does where torch is installed, by one process before the ranks start: they find it cached."""
    from ..launcher import api

    plan = read_plan(folder)
    try:
        prepared = api.preflight(
            plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"scheduler": "local"})})
        )
        assert prepared is not None
    except TrebuchetError as problem:
        print(f"trebuchet: {problem}", file=sys.stderr)
        record.end_attempt(folder, JobState.FAILED, problem.exit_code, str(problem))
        return problem.exit_code
    record.update(folder, data=prepared.report.to_dict())
    return 0


def close_silent(folder: RunFolder, attempt: dict[str, Any], facts: classify.Facts) -> None:
    """The script of the last attempt never came to its end: a node went, or Slurm took the job with no grace time."""
    gone = [n for n in attempt.get("nodes", ()) if classify.is_gone(facts.node_states.get(n, ""))]
    if gone:
        state, kind, reason = JobState.NODE_FAIL, "node", f"node {', '.join(gone)} failed; Slurm requeued the job"
    else:
        state, kind, reason = JobState.PREEMPTED, "preempted", "Slurm requeued the job without letting it finish"
    record.update(folder, attempt={"kind": kind})
    record.end_attempt(folder, state, 1, reason, goes_on=True)


def end(folder: RunFolder, facts: classify.Facts, status: int, warning_s: int, restarts: int | None) -> str:
    """Closes the attempt and returns the script's order. `restarts`: after failures; None where jobs may not requeue."""
    found = record.read(folder)
    attempt, history = found["attempts"][-1], found["attempts"][:-1]
    folder.reserve.unlink(missing_ok=True)
    outcome = json.loads(folder.outcome.read_text(encoding="utf-8")) if folder.outcome.exists() else None
    kept = newest_step(folder) > attempt["first_step"]
    may_want_less = status != 0 and (outcome is None or outcome["exit_code"] == 1)
    following: Plan | None = None
    lighter, on_cpu = None, False
    if may_want_less:
        following, lighter, on_cpu = after_memory(read_plan(folder))
    verdict = classify.classify(
        outcome,
        status,
        said(folder, attempt.get("log_from", 0)),
        facts,
        history,
        asked_to_stop=folder.stop.exists(),
        warning_s=max(warning_s, math.ceil(attempt.get("lead_s", 0))),
        restarts=restarts or 0,
        lighter=lighter,
        on_cpu=on_cpu,
        kept=kept,
    )
    requeued = verdict.action in ("requeue", "avoid") and restarts is not None
    if verdict.action == "leave":  # cancelled, or requeued by Slurm: the next attempt or `status` will know which
        return "exit 0"
    record.update(folder, attempt={"kind": verdict.kind, "kept": kept})
    reason = evidence(folder, verdict, outcome)
    code = 130 if verdict.kind == "user" else 1 if verdict.action != "exit" else verdict.exit_code
    record.end_attempt(folder, verdict.state, code, reason, goes_on=requeued)
    if verdict.kind == "user":
        folder.stop.unlink(missing_ok=True)
    if following and verdict.state == JobState.OUT_OF_MEMORY and verdict.action == "requeue":
        # For `resume` too, where jobs may not requeue themselves.
        record.write_atomically(folder.plan, following.model_dump_json(indent=1) + "\n")
    if not requeued:
        return f"exit {code}"
    if verdict.action == "avoid":
        return f"avoid {','.join(name for name in (facts.excluded, verdict.node) if name)}"
    return "requeue"


def after_memory(plan: Plan) -> tuple[Plan | None, str | None, bool]:
    """The plan that follows an out of memory, what it changes, and whether the model is in host memory; no plan when
    nothing lighter is left."""
    from ..launcher import retry

    following = retry.lighter(plan)
    assert plan.chosen is not None
    words = retry.words(plan.chosen, following.chosen) if following and following.chosen else None
    return following, words, plan.chosen.device == "cpu"


def evidence(folder: RunFolder, verdict: classify.Verdict, outcome: dict[str, Any] | None) -> str | None:
    """The reason, and for a failure the last lines of the rank that failed first."""
    if verdict.kind not in ("node", "program", "hang", "host-oom") or verdict.reason is None:
        return verdict.reason
    first = classify.ENDED.search(said(folder, record.read(folder)["attempts"][-1].get("log_from", 0)))
    rank = int(first["task"]) if first else outcome["rank"] if outcome else 0
    log = folder.log(rank)
    if not log.exists():
        log = folder.scheduler_log
    if not log.exists():
        return verdict.reason
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
    return f"{verdict.reason} Last lines of {log}: {' / '.join(lines)}"


def said(folder: RunFolder, start: int) -> str:
    """The job's own log since `start`, at most its last 64 KiB."""
    log = folder.scheduler_log
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 65536))
        return file.read().decode("utf-8", errors="replace")


def newest_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint that was written to its end; 0 without one."""
    steps = [p.parent.name.removeprefix("step-") for p in folder.checkpoints.glob("step-*/manifest.json")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def read_plan(folder: RunFolder) -> Plan:
    from ..launcher.plan import Plan

    return Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    folder = RunFolder(Path(arguments[1]))
    facts = classify.read_facts(sys.stdin.read())
    if arguments[0] == "begin":
        return begin(folder, facts)
    status, warning_s, restarts = arguments[2:]
    print(end(folder, facts, int(status), int(warning_s), None if restarts == "none" else int(restarts)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
