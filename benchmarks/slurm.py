"""Times on a real Slurm of this machine (tests/slurm/cluster.py): what our script costs, 1,000 trials, and preemptions.

    python benchmarks/slurm.py [overhead] [trials] [preemptions=N] [kills=N] [--json FILE]

overhead      sbatch to the first line of Python in the rank, and to the job's end: our script against one written by hand;
              and from handing in a run to its first training step
trials        1,000 trials as our sweep, 1,000 calls by submitit's map_array, 1,000 sbatch calls: seconds, and RPCs at the controller
              (sdiag); planning and writing the sweep's folders is counted by itself
preemptions   steps and seconds lost, and the time to the next attempt's first step; N with grace time and N without (default 20);
              without, a run still has what Slurm leaves between SIGTERM and SIGKILL (KillWait: 5 s here, 30 s unless a site says so)
kills         the same for a rank killed with -9 at a random step, N times (default 20): no warning of any kind

Needs root and slurm-wlm and munge (installed by apt when absent). Left out: queueing, which is the site's.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from slurm_here import cluster_file, preempt, slurm_here, wait_for_step
from trebuchet.launcher import api, record
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.slurm.fanout import fan_out
from trebuchet.slurm.site import build_site

REPEATS = 5
RANK = "import time, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(time.time()))"


def overhead(cluster: Any, work: Path) -> dict[str, Any]:
    """Medians in seconds. Ours is a whole run script whose rank is one line of Python; its record is kept as for any run."""
    from trebuchet.slurm.scheduler import preview

    site = build_site({"partition": "low", "time": "5"}, "bench")
    found: dict[str, Any] = {}
    folder, plan = begin(work / "overhead")
    folder.logs.mkdir()
    (folder.root / "rank.py").write_text(RANK)
    ours = preview(plan, folder)
    call = re.search(r'"\$python" -m trebuchet\.launcher\.worker "\$run"', ours)
    assert call is not None
    mark = folder.root / "mark"
    ours = ours.replace(call[0], f'"$python" rank.py {mark}')
    by_hand = (
        f"#!/bin/bash\n#SBATCH --partition=low\n#SBATCH --ntasks-per-node=1\n#SBATCH --output={work}/hand.log\n"
        f"#SBATCH --export=NONE\nexport SLURM_EXPORT_ENV=ALL\ncd {folder.root}\nsrun {sys.executable} rank.py {mark}\n"
    )
    assert site.requeue
    scripts = {"by_hand": by_hand, "ours": ours}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in scripts}
    for name, text in scripts.items():
        (work / f"{name}.sh").write_text(text)
    for _ in range(REPEATS):  # in turns: what else the machine does falls on both
        for name in scripts:
            mark.unlink(missing_ok=True)
            record.update(folder, state="PENDING")
            began = time.time()
            job = cluster.ask("sbatch", "--parsable", str(work / f"{name}.sh")).strip()
            cluster.wait_state(job, "COMPLETED", "FAILED")
            times[name].append((float(mark.read_text()) - began, time.time() - began))
    for name, pairs in times.items():
        starts, ends = zip(*pairs, strict=True)
        found[name] = {"to_first_line_s": statistics.median(starts), "to_end_s": statistics.median(ends)}
    for i, key in enumerate(("to_first_line_s", "to_end_s")):
        gaps = [ours[i] - hand[i] for ours, hand in zip(times["ours"], times["by_hand"], strict=True)]
        found[f"difference_{key}"] = statistics.median(gaps)
    found["submit_to_first_step_s"] = [first_step(cluster, work / f"run-{n}") for n in range(3)]
    return found


def first_step(cluster: Any, output: Path) -> float:
    """Seconds from handing in a run of a tiny model to its first training step in the record; nobody else wants the nodes."""
    from trebuchet.slurm import scheduler

    folder, plan = begin(output)
    began = time.time()
    job = scheduler.job_id(scheduler.submit(folder, plan).handle)
    seconds = wait_for_step(folder, 1, 1) - began
    cluster.ask("scancel", job)
    cluster.wait_state(job, "CANCELLED", "COMPLETED", "FAILED")
    return seconds


def trials(cluster: Any, work: Path) -> dict[str, Any]:
    """Seconds until the scheduler has all of them, held so that none runs, and RPCs counted by sdiag meanwhile."""
    from trebuchet.launcher import sweep

    site = build_site({"partition": "low", "time": "5", "extra": ["--hold"]}, "bench")
    script = work / "one.sh"
    script.write_text("#!/bin/bash\n#SBATCH --partition=low\n#SBATCH --hold\n#SBATCH --output=/dev/null\ntrue\n")
    space = {"optimization.learning_rate": {"log_uniform": [1e-5, 1e-2]}}
    config = configuration(work / "sweep", partition="low", extra=["--hold"])
    began = time.perf_counter()
    folder = sweep.begin(sweep.plan_sweep({**config, "sweep": {"space": space, "trials": 1000}}))
    prepared = time.perf_counter() - began

    def map_array() -> None:
        fan_out(math.sqrt, range(1000), site=site, folder=work / f"array-{time.time_ns()}", name="trials")

    def singly() -> None:
        for _ in range(1000):
            cluster.ask("sbatch", str(script))

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: sweep.start(folder, range(1000)),
        "submitit map_array": map_array,
        "1,000 sbatch calls": singly,
    }
    found: dict[str, Any] = {"seconds to plan and write 1,000 trials": prepared}
    for name, submit in ways.items():
        before, began = rpcs(cluster), time.perf_counter()
        submit()
        taken, after = time.perf_counter() - began, rpcs(cluster)
        found[name] = {"seconds": taken, **{kind: after[kind] - before[kind] for kind in after}}
        cluster.ask("scancel", "--user=root")
    return found


def rpcs(cluster: Any) -> dict[str, int]:
    """Messages that the controller has had: jobs submitted, and all but its own and sdiag's."""
    counts = dict(re.findall(r"(\w+)\s+\(\s*\d+\)\s+count:(\d+)", cluster.ask("sdiag").partition("by user")[0]))
    own = ("MESSAGE_NODE_REGISTRATION_STATUS", "REQUEST_STATS_INFO")
    return {
        "submit_rpcs": int(counts.get("REQUEST_SUBMIT_BATCH_JOB", 0)),
        "rpcs": sum(int(count) for kind, count in counts.items() if kind not in own),
    }


def preemptions(cluster: Any, work: Path, count: int) -> dict[str, Any]:
    """Two endless runs of a tiny model on one rank each, one in a partition with grace time, one without; each preemption takes both.

    `seconds_to_first_step`: from handing in the job that preempts to the next attempt's first step seen in the record. Slurm's own
    wait before a requeued job may start (AuthInfo=cred_expire, 5 s here and 120 s unless a site says otherwise) is in it.
    """
    from trebuchet.slurm import scheduler

    runs = {name: begin(work / part, part) for name, part in {"with": "low", "without": "abrupt"}.items()}
    for folder, plan in runs.values():
        scheduler.submit(folder, plan)
    waits: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(1, count + 1):
        for folder, _ in runs.values():
            wait_for_step(folder, attempt, 15)
        taken = preempt(cluster)
        for name, (folder, _) in runs.items():
            waits[name].append(wait_for_step(folder, attempt + 1, 1) - taken)
    cluster.ask("scancel", "--user=root")
    return {f"{name} grace time": lost(folder, waits[name]) for name, (folder, _) in runs.items()}


def kills(cluster: Any, work: Path, count: int) -> dict[str, Any]:
    """One endless run on one rank, which is killed with -9 between 15 and 24 steps after the attempt began; a checkpoint every ten."""
    from trebuchet.slurm import scheduler

    folder, plan = begin(work / "killed", restarts=count)
    scheduler.submit(folder, plan)
    waits, draw = [], random.Random(0)
    for attempt in range(1, count + 1):
        wait_for_step(folder, attempt, draw.randrange(15, 25))
        began = time.time()
        os.kill(rank_of(folder), signal.SIGKILL)
        waits.append(wait_for_step(folder, attempt + 1, 1) - began)
    cluster.ask("scancel", "--user=root")
    return lost(folder, waits)


def rank_of(folder: RunFolder) -> int:
    """The process that trains."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:3] == ["-m", "trebuchet.launcher.worker"] and str(folder.root) in words:
            return int(process.pid)
    sys.exit(f"no rank of {folder.root} runs")


def lost(folder: RunFolder, waits: list[float]) -> dict[str, Any]:
    """Steps done by an attempt that its successor had to do again, by the record, which counts each step as it is done."""
    pairs = list(itertools.pairwise(record.read(folder)["attempts"]))
    steps = [a["last_step"] - b["first_step"] for a, b in pairs]
    rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    step_s = statistics.median(row["step_s"] for row in rows if "step_s" in row)
    return {
        "ends": dict(Counter(a["kind"] for a, _ in pairs)),
        "steps_lost": steps,
        "median_step_s": step_s,
        "seconds_of_steps_lost": sum(steps) * step_s / len(steps),
        "seconds_to_first_step": statistics.median(waits),
        "seconds_to_first_step_largest": max(waits),
    }


def begin(output: Path, partition: str = "low", **slurm: Any) -> tuple[RunFolder, Any]:
    return api.begin(configuration(output, partition, **slurm))


def configuration(output: Path, partition: str, **slurm: Any) -> dict[str, Any]:
    """A tiny model on one CPU rank, with checkpoints every ten steps and no end in sight."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model(output.parent / "model", shape)
    rows = output.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " * 8}) + "\n" for i in range(64)))
    return {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": {"train": {"path": str(rows), "format": "text"}, "eval": 0, "max_length": 64},
        "objective": "pretrain",
        "strategy": {"method": "full"},
        "optimization": {"global_batch_size": 4, "max_steps": 10**6},
        "checkpointing": {"every": 10, "keep": 2},
        "tracking": [],
        "output": str(output),
        "cluster": {"name": str(cluster_file(output.parent, partition, **slurm))},
    }


def tiny_model(folder: Path, shape: dict[str, int]) -> Path:
    if folder.exists():
        return folder
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(raw.get_vocab()), max_position_embeddings=128, **shape)
    ).save_pretrained(folder)
    return folder


def main(words: list[str]) -> None:
    wanted = [w for w in words if not w.endswith(".json") and w != "--json"] or [
        "overhead",
        "trials",
        "preemptions=20",
        "kills=20",
    ]
    verbs: dict[str, Callable[..., Any]] = {
        "overhead": overhead,
        "trials": trials,
        "preemptions": preemptions,
        "kills": kills,
    }
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
    found: dict[str, Any] = {"slurm": version}
    with slurm_here() as (cluster, folder):
        for word in wanted:
            name, _, count = word.partition("=")
            work = folder / name
            work.mkdir()
            found[name] = verbs[name](cluster, work, *([int(count)] if count else []))
            found[name]["load"] = os.getloadavg()
            print(json.dumps({name: found[name]}, indent=1), flush=True)
    if "--json" in words:
        Path(words[words.index("--json") + 1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
