"""Times on a real Slurm of this machine (tests/slurm/cluster.py): what our script costs, 1,000 trials, and preemptions.

    python benchmarks/slurm.py [overhead] [trials] [preemptions=N] [--json FILE]

overhead      sbatch to the first line of Python in the rank, and to the job's end: our script against one written by hand
trials        1,000 trials as our sweep, 1,000 calls by submitit's map_array, 1,000 sbatch calls: seconds, and RPCs at the controller
              (sdiag); planning and writing the sweep's folders is counted by itself
preemptions   steps and seconds lost, N with a warning and N without (default 20 of each)

Needs root and slurm-wlm and munge (installed by apt when absent). Left out: queueing, which is the site's.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from trebuchet.launcher import api, record
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.slurm.fanout import fan_out
from trebuchet.slurm.site import build_site

ROOT = Path(__file__).resolve().parent.parent
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
    return found


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
    """One endless run of a tiny model, preempted `count` times with grace time, then as often without."""
    found = {}
    for name, partition in {"with warning": "low", "without warning": "abrupt"}.items():
        folder, plan = begin(work / partition, partition)
        from trebuchet.slurm import scheduler

        scheduler.submit(folder, plan)
        for attempt in range(1, count + 1):
            wait_for_steps(folder, attempt, 15)
            cluster.ask("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
        wait_for_steps(folder, count + 1, 1)
        cluster.ask("scancel", "--user=root")
        attempts = record.read(folder)["attempts"]
        pairs = list(itertools.pairwise(attempts))
        found[name] = {
            "preemptions": count,
            "steps_lost": [a["last_step"] - b["first_step"] for a, b in pairs],
            "seconds_between": [seconds(a["ended"], b["started"]) for a, b in pairs],
        }
    return found


def begin(output: Path, partition: str = "low") -> tuple[RunFolder, Any]:
    return api.begin(configuration(output, partition))


def configuration(output: Path, partition: str, **slurm: Any) -> dict[str, Any]:
    """A tiny model on one CPU rank, with checkpoints every ten steps and no end in sight."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model(output.parent / "model", shape)
    rows = output.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " * 8}) + "\n" for i in range(64)))
    file = output.parent / f"{partition}.yaml"
    settings = {"partition": partition, "time": "60", **slurm}
    file.write_text(
        json.dumps({"scheduler": "slurm", "groups": [{"host_memory_gib": 8, "cores": 1}], "slurm": settings})
    )
    return {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": {"train": {"path": str(rows), "format": "text"}, "eval": 0, "max_length": 64},
        "objective": "pretrain",
        "strategy": {"method": "full"},
        "optimization": {"global_batch_size": 4, "max_steps": 10**6},
        "checkpointing": {"every": 10, "keep": 2},
        "output": str(output),
        "cluster": {"name": str(file)},
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


def wait_for_steps(folder: RunFolder, attempt: int, steps: int) -> None:
    while True:
        found = record.read(folder)
        last = found["attempts"][-1] if found["attempts"] else None
        if (
            last
            and len(found["attempts"]) >= attempt
            and not last["ended"]
            and found["step"] >= last["first_step"] + steps
        ):
            return
        time.sleep(0.2)


def seconds(ended: str, started: str) -> float:
    return (datetime.fromisoformat(started) - datetime.fromisoformat(ended)).total_seconds()


def main(words: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("slurm_cluster", ROOT / "tests/slurm/cluster.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["slurm_cluster"] = module
    spec.loader.exec_module(module)
    refused = module.install()
    if refused:
        sys.exit(refused)
    wanted = [w for w in words if not w.endswith(".json") and w != "--json"] or ["overhead", "trials", "preemptions=20"]
    verbs: dict[str, Callable[..., Any]] = {"overhead": overhead, "trials": trials, "preemptions": preemptions}
    with tempfile.TemporaryDirectory(prefix="slurm-bench-") as folder:
        cluster = module.SlurmCluster(root=Path(tempfile.mkdtemp(prefix="slurm-")))
        os.environ["SLURM_CONF"] = str(cluster.root / "slurm.conf")
        os.environ["TREBUCHET_CACHE"] = f"{folder}/cache"
        found: dict[str, Any] = {
            "slurm": subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
        }
        try:
            cluster.start()
            for word in wanted:
                name, _, count = word.partition("=")
                work = Path(folder) / name
                work.mkdir()
                found[name] = verbs[name](cluster, work, *([int(count)] if count else []))
                found[name]["load"] = os.getloadavg()
                print(json.dumps({name: found[name]}, indent=1), flush=True)
        finally:
            cluster.stop()
    if "--json" in words:
        Path(words[words.index("--json") + 1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
