"""Why an attempt ended and what follows, on the words that Slurm, srun and the ranks really print."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.slurm.classify import Facts, Verdict, classify, read_facts

# `scontrol show job --oneliner` of Slurm 22.05 during the grace time of a preemption, shortened in the middle.
PRINTED = """\
Now=2026-11-21T23:35:54
JobId=1 JobName=t1.sh UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 Account=(null) QOS=(null) \
JobState={state} Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:03 \
StartTime=2026-11-21T23:35:51 EndTime={end} Deadline=N/A PreemptEligibleTime=2026-11-21T23:35:51 PreemptTime={preempt} \
Partition=low AllocNode:Sid=localhost:10529 ReqNodeList=(null) ExcNodeList={excluded} NodeList=n[1-2] BatchHost=n1
Allocated=n1
Allocated=n2
Node=n1={n1}
Node=n2=alloc
Node=n3=idle
Node=n4={n4}
"""
KILLED = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n"
# Slurm 22.05 with JobAcctGatherParams=OverMemoryKill.
EXCEEDED = (
    "0: slurmstepd-n1: error: StepId=1.0 exceeded memory limit (402169856 > 314572800), being killed\n"
    "slurmstepd-n1: error: Exceeded job memory limit\nsrun: error: n1: task 0: Killed\n"
)
# Slurm 22.05 with the slurmd of n2 stopped by SIGSTOP.
NOT_LAUNCHED = (
    "srun: error: slurm_receive_msgs: [[localhost]:35529] failed: Socket timed out on send/recv operation\n"
    "srun: error: Task launch for StepId=1.0 failed on node n2: Socket timed out on send/recv operation\n"
    "srun: error: Application launch failed: Socket timed out on send/recv operation\nsrun: Job step aborted\n"
)
FAILED = "1: Traceback\nsrun: error: n2: task 1: Exited with exit code 1\n"


def facts(state: str = "RUNNING", end: str = "2026-11-22T00:35:51", preempt: str = "None", excluded: str = "(null)",
          n1: str = "alloc", n4: str = "idle") -> Facts:  # fmt: skip
    return read_facts(PRINTED.format(state=state, end=end, preempt=preempt, excluded=excluded, n1=n1, n4=n4))


def ask(outcome: tuple[int, str | None] | None, status: int = 1, said: str = "", known: Facts | None = None,
        history: list[dict[str, Any]] | None = None, **changes: Any) -> Verdict:  # fmt: skip
    left = None if outcome is None else {"exit_code": outcome[0], "error": outcome[1], "rank": 0}
    options = {
        "asked_to_stop": False,
        "warning_s": 60,
        "restarts": 3,
        "lighter": "micro-batch 2 instead of 4",
        "on_cpu": False,
        "kept": True,
    } | changes
    return classify(left, status, said, known or facts(), history or [], **options)


def test_facts_are_read() -> None:
    found = facts(preempt="2026-11-21T23:35:54", excluded="n3")
    assert found.job == "1" and found.preempted and found.allocated == ("n1", "n2") and found.excluded == "n3"
    assert found.end is not None and (found.end - found.now).total_seconds() == 3597
    assert not facts().preempted and facts().excluded == "" and facts().node_states["n3"] == "idle"


@pytest.mark.parametrize(
    ("answer", "kind", "action"),
    [
        (ask((0, None), 0), "finished", "exit"),
        (ask((75, None), 0, asked_to_stop=True), "user", "exit"),
        (ask((75, None), 0, known=facts(preempt="2026-11-21T23:35:54")), "preempted", "requeue"),
        (ask(None, 143, known=facts(preempt="2026-11-21T23:35:54")), "preempted", "requeue"),  # killed while loading
        (ask((75, None), 0, known=facts(end="2026-11-21T23:36:30")), "time-limit", "requeue"),
        (ask(None, 143, known=facts(end="2026-11-21T23:36:30")), "time-limit", "requeue"),
        (ask((75, None), 0), "user", "exit"),  # a signal that nobody of ours and no limit sent
        (ask(None, 143, known=facts(state="COMPLETING")), "slurm", "leave"),
        (ask((1, "out of memory: CUDA out of memory. Tried to allocate 2 GiB"), 1, FAILED), "oom", "requeue"),
        (ask((1, "out of memory: CUDA out of memory."), 1, FAILED, lighter=None), "oom", "exit"),
        (ask(None, 137, "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n" + KILLED), "host-oom", "exit"),
        (ask(None, 137, EXCEEDED), "host-oom", "exit"),  # on a GPU host memory does not follow the micro-batch
        (ask(None, 137, EXCEEDED, on_cpu=True), "host-oom", "requeue"),
        (ask(None, 137, EXCEEDED, on_cpu=True, lighter=None), "host-oom", "exit"),
        (ask((1, "RuntimeError: Connection closed by peer [127.0.0.1]:34"), 137, KILLED), "node", "avoid"),
        (ask((1, "DistBackendError: NCCL error: unhandled system error"), 1, FAILED), "node", "avoid"),
        (ask(None, 137, KILLED, known=facts(n1="down*")), "node", "avoid"),
        (ask(None, 140, NOT_LAUNCHED), "node", "avoid"),
        (ask(None, 137, KILLED, known=facts(n4="drain")), "node", "avoid"),  # n1 and n3 are enough
        (ask(None, 137, KILLED, known=facts(excluded="n3", n4="drain")), "node", "requeue"),  # no node to spare
        (ask((1, "RuntimeError: Timed out waiting 600000ms for recv"), 1, FAILED), "hang", "requeue"),
        (ask((1, "hang: no step for 1800 s after step 7. Rank 3 on n2 is …"), 1, FAILED), "hang", "requeue"),
        (ask((2, "row 3 of train.jsonl has no messages"), 2, FAILED), "input", "exit"),
        (ask((1, "ValueError: shapes differ"), 1, FAILED), "program", "exit"),
        (ask((1, "no space left on the device that holds /runs/x"), 1, FAILED), "program", "exit"),
        (ask(None, 127, "bash: python: command not found\n"), "program", "exit"),
    ],
)  # fmt: skip
def test_verdicts(answer: Verdict, kind: str, action: str) -> None:
    assert (answer.kind, answer.action) == (kind, action)
    assert answer.action != "exit" or kind in ("finished", "user") or answer.exit_code != 0


def test_the_first_rank_to_fail_is_named() -> None:
    echo = (1, "RuntimeError: Connection closed by peer")  # rank 0 says so because rank 1 was killed
    answer = ask(echo, 137, KILLED)
    assert answer.reason is not None and answer.reason.startswith("rank 1 on n2: Killed") and answer.node == "n2"


MISSED = "another rank ended in the middle of a step, and this one waited for it; its log has the cause"
ECHOED = "srun: error: n1: task 0: Exited with exit code 1\n"


@pytest.mark.parametrize(
    ("said", "n1", "node", "words"),
    [
        (ECHOED, "alloc", "n2", "nothing was heard from n2, and rank 0 on n1: Exited with exit code 1"),
        (ECHOED + "srun: error: Node failure on n2\n", "alloc", "n2", "node n2 failed"),
        (
            ECHOED + "srun: error: n2: task 1: Killed\n",
            "alloc",
            None,
            "rank 0 on n1",
        ),  # by srun itself, as far as one can see
        (ECHOED, "down*", "n1", "node n1 is down*"),
    ],
)
def test_a_rank_that_missed_another_does_not_condemn_its_own_node(
    said: str, n1: str, node: str | None, words: str
) -> None:
    """A node went, and srun told first of the rank of the other one that waited for it: seen on Slurm 22.05."""
    answer = ask((1, MISSED), 1, said, known=facts(n1=n1))
    assert (answer.kind, answer.node) == ("node", node) and str(answer.reason).startswith(words)
    assert answer.action == ("avoid" if node else "requeue")


def test_the_node_that_starts_no_rank_is_named() -> None:
    """Also where ranks of other nodes, which srun ends then, are what it speaks of first."""
    for said in (NOT_LAUNCHED, "srun: error: n1: task 0: Killed\n" + NOT_LAUNCHED):
        answer = ask(None, 140, said)
        assert answer.node == "n2" and str(answer.reason).startswith("n2 started no rank: Socket timed out")


def test_failures_are_bounded_and_preemptions_are_not() -> None:
    preempted = [{"kind": "preempted"}] * 500 + [{"kind": "time-limit", "kept": True}] * 500
    assert ask(None, 137, KILLED, history=[*preempted, {"kind": "node"}, {"kind": "node"}]).action == "avoid"
    last = ask(None, 137, KILLED, history=[*preempted, *[{"kind": "node"}] * 3])
    assert last.action == "exit" and last.exit_code and "last of 3" in str(last.reason)
    taken = facts(preempt="2026-11-21T23:35:54")
    assert ask((75, None), 0, known=taken, history=preempted).action == "requeue"
    hang = (1, "RuntimeError: Timed out waiting 600000ms")
    assert ask(hang, 1, FAILED, history=[{"kind": "hang"}]).action == "exit"


def test_a_time_limit_too_short_for_one_step_ends() -> None:
    near, idle = facts(end="2026-11-21T23:36:30"), {"kind": "time-limit", "kept": False}
    assert ask((75, None), 0, known=near, history=[idle, idle], kept=True).action == "requeue"
    assert ask(None, 143, known=near, history=[idle, {**idle, "kept": True}], kept=False).action == "requeue"
    answer = ask(None, 143, known=near, history=[idle, idle], kept=False)
    assert answer.action == "exit" and "slurm.time" in str(answer.reason)


@given(st.text(), st.one_of(st.none(), st.tuples(st.sampled_from([0, 1, 2, 75, 130]), st.one_of(st.none(), st.text()))),
       st.integers(0, 255))  # fmt: skip
def test_every_end_has_a_verdict(said: str, outcome: tuple[int, str | None] | None, status: int) -> None:
    answer = ask(outcome, status, said, known=read_facts(said))
    assert answer.action in ("requeue", "avoid", "exit", "leave")
    assert answer.state.ended
