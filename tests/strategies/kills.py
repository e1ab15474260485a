"""Kills the ranks of a run at random moments, again and again, and goes on with it; forks them, so that a start costs a second.

    python kills.py JOB.json      {"quiet": RUN, "run": RUN, "disk": FOLDER | null, "kills": N, "seed": N, "out": FILE}

Both runs are begun (train.yaml, plan.json, run.json) and have the same plan; `quiet` is left in peace. A kill is SIGKILL to one rank
or to all, in a step or in a save, which follows every step. In one attempt in the middle `disk`, a file system of its own that holds
the run, fills up to a few kilobytes, so that a save ends in the middle of a file; without a disk the kernel allows no larger file.
Before all that, rank 1 of one attempt never ends loading.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORLD = 2
LIMIT_S = 300.0
FILE_BYTES = 96 * 1024  # less than a shard of the checkpoint, more than a log
LOADING_S = 10.0  # some 2 are needed on a quiet machine


def fork(run: str, *, small_files: bool = False, stuck: int | None = None) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path(run, "logs", "outcome.json").unlink(missing_ok=True)
    ranks = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD)}
            if small_files:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
            if stuck is not None:
                stick(rank == stuck)
            from trebuchet.launcher import worker

            code = worker.main(run)
            sys.stdout.flush()
            os._exit(code)
        ranks.append(pid)
    return ranks


def stick(here: bool) -> None:
    """Loading may take LOADING_S, and takes for ever on this rank."""
    from trebuchet.training import session, watchdog

    os.environ["TREBUCHET_LOADING_S"] = str(LOADING_S)
    watchdog.GATHER_S = 3.0  # the ranks began to wait within a second of each other
    if here:
        session.prepare = lambda *a, **k: time.sleep(LIMIT_S)  # type: ignore[assignment]


def fill(disk: str, run: str, before: int, over: threading.Event) -> None:
    """Once the run has made a step takes all but FILE_BYTES of a file system, and what is given back, until `over`."""
    for i in itertools.count():
        if over.wait(0.005):
            return
        system = os.statvfs(disk)
        size = system.f_bavail * system.f_frsize - FILE_BYTES
        if last_step(run) > before and size > 0:
            with Path(disk, f"ballast-{i}").open("wb") as file, contextlib.suppress(OSError):  # the ranks were faster
                os.posix_fallocate(file.fileno(), 0, size)


def without_room(run: str, disk: str | None) -> dict[str, Any]:
    """One attempt whose save finds no room."""
    from trebuchet.launcher.run_folder import RunFolder
    from trebuchet.training import checkpoint

    over, before = threading.Event(), last_step(run)
    ranks = fork(run, small_files=disk is None)
    thread = threading.Thread(target=fill, args=(disk, run, before, over))
    if disk:
        thread.start()
    codes = reap(ranks, grace_s=LIMIT_S)
    over.set()
    if disk:
        thread.join()
        for ballast in Path(disk).glob("ballast-*"):
            ballast.unlink()
    outcome = json.loads(Path(run, "logs", "outcome.json").read_text())
    kept = sorted(path.name for path in Path(run, "checkpoints").iterdir())
    valid = checkpoint.latest(RunFolder(Path(run)))
    found = {"checkpoints": kept, "valid": valid and checkpoint.step_of(valid)}
    return {"codes": codes, "error": outcome["error"], "at": last_step(run), **found}


def last_step(run: str) -> int:
    path = Path(run, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def reap(ranks: list[int], *, grace_s: float) -> list[int]:
    """Exit codes; ranks that do not end by themselves within `grace_s` are killed."""
    until = time.monotonic() + grace_s
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in ranks]


def kill_once(run: str, draw: random.Random, moment_s: float) -> dict[str, Any]:
    """Lets the run make a few steps, then kills."""
    before = last_step(run)
    ranks = fork(run)
    goal, until = before + draw.randint(1, 3), time.monotonic() + LIMIT_S
    while last_step(run) < goal and time.monotonic() < until and not any(os.waitpid(p, os.WNOHANG)[0] for p in ranks):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, moment_s))  # the moment is the random part, not something to wait for
    victims = draw.choice([ranks, ranks[:1], ranks[1:]])
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    codes = reap(ranks, grace_s=20)
    writing = [p.name for p in Path(run, "checkpoints").glob(".step-*.writing")]
    return {"from": before, "at": last_step(run), "victims": len(victims), "codes": codes, "writing": writing}


def main(path: str) -> int:
    import accelerate
    import bitsandbytes
    import peft
    import torch
    import trebuchet.training.session  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    assert all((accelerate, bitsandbytes, peft))
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    draw = random.Random(job["seed"])
    codes = reap(fork(job["quiet"]), grace_s=LIMIT_S)
    if any(codes):
        print(f"the quiet run ended with {codes}", file=sys.stderr)
        return 1
    lines = [json.loads(line) for line in Path(job["quiet"], "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(line["step_s"] for line in lines if "step_s" in line)
    seen: dict[str, Any] = {"kills": [], "full": None}
    codes = reap(fork(job["run"], stuck=1), grace_s=LIMIT_S)
    seen["stuck"] = {"codes": codes, **json.loads(Path(job["run"], "logs", "outcome.json").read_text())}
    for i in range(job["kills"]):
        if i == job["kills"] // 2:
            seen["full"] = without_room(job["run"], job["disk"])
        # A step and the save after it: the median step, and half as much again for the save.
        seen["kills"].append(kill_once(job["run"], draw, 1.5 * seconds[len(seconds) // 2]))
    seen["end"] = reap(fork(job["run"]), grace_s=LIMIT_S)
    Path(job["out"]).write_text(json.dumps(seen, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
