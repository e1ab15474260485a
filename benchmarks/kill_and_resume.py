"""The demo's model over two ranks of this machine in each layout: trained, one rank killed with SIGKILL, resumed, compared.

    python benchmarks/kill_and_resume.py FOLDER [LAYOUT …]        default: ddp fsdp2 zero3

Model and rows are those of `make demo` (examples/smollm2.py, examples/stdlib_docstrings.py), of which the short rows. The first layout is
also trained undisturbed; every other run is compared with that one, and each resumed run with what it had recorded before the kill. A few
short steps: this shows that runs go on, not how fast they are.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
STEPS, KILLED_AFTER, SAVED_EVERY = 4, 3, 2
CHARACTERS = 280  # of a row; it then fits into data.max_length
FEW = {
    "data.max_length": 128, "optimization.max_steps": STEPS, "optimization.global_batch_size": 2,
    "evaluation.every": STEPS, "evaluation.max_rows": 4, "evaluation.generations": 1, "evaluation.max_new_tokens": 4,
    "evaluation.forgetting": 0, "checkpointing.every": SAVED_EVERY, "cluster.processes": 2,
}  # fmt: skip


def command(folder: Path, run: Path, layout: str) -> list[str]:
    changes = {**FEW, "strategy.parallel": layout, "output": run}
    changes |= {
        f"data.{key}": folder / f"short-{name}.jsonl" for key, name in (("train", "train"), ("eval", "heldout"))
    }
    words = [sys.executable, "-m", "trebuchet.launcher.cli", "run", str(ROOT / "examples" / "demo.yaml")]
    return [*words, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {v["step"]: v["loss"] for v in map(json.loads, lines) if "loss" in v}


def finished(words: list[str], log: Path) -> float:
    began = time.monotonic()
    with log.open("ab") as out:
        subprocess.run(words, stdout=out, stderr=out, check=True)
    return time.monotonic() - began


def killed(words: list[str], run: Path, log: Path) -> dict[int, float]:
    """Rank 1 gets SIGKILL once step KILLED_AFTER is recorded; the losses up to then."""
    with log.open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
        while KILLED_AFTER not in losses(run):
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode}; see {log}")
            time.sleep(0.02)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        os.kill(ranks[-1].pid, signal.SIGKILL)
        if process.wait() != 1:
            raise SystemExit(f"a run with a killed rank ended with {process.returncode}; see {log}")
    return losses(run)


def main(folder: Path, layouts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runpy.run_path(str(ROOT / "examples" / "smollm2.py"))["make"](
        Path("~/.cache/trebuchet/models/SmolLM2-135M-Instruct").expanduser()
    )
    if not (folder / "train.jsonl").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "stdlib_docstrings.py"), str(folder)], check=True)
    for name in ("train", "heldout"):
        rows = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        short = "".join(row for row in rows if len(row) < CHARACTERS)
        (folder / f"short-{name}.jsonl").write_text(short, encoding="utf-8")
    quiet = folder / "undisturbed"
    if not quiet.exists():
        seconds = finished(command(folder, quiet, layouts[0]), folder / "undisturbed.log")
        print(f"undisturbed {layouts[0]}: {seconds:.0f} s, losses {list(losses(quiet).values())}", flush=True)
    wanted = losses(quiet)
    for layout in layouts:
        run, log = folder / layout, folder / f"{layout}.log"
        before = killed(command(folder, run, layout), run, log)
        last = max(before)
        seconds = finished([sys.executable, "-m", "trebuchet.launcher.cli", "resume", str(run)], log)
        after = losses(run)
        attempts = json.loads((run / "run.json").read_text())["attempts"]
        again = range(attempts[-1]["first_step"] + 1, last + 1)
        same = all(after[step] == before[step] for step in again)
        furthest = max(abs(after[step] - wanted[step]) / wanted[step] for step in wanted)
        print(
            f"{layout}: killed after step {last}, resumed after step {attempts[-1]['first_step']} ({seconds:.0f} s); steps made again "
            f"({len(again)}) equal to the bit: {same}; furthest from {quiet.name}: {furthest:.1e}; losses {list(after.values())}",
            flush=True,
        )
        if not same or set(after) != set(wanted) or furthest > 1e-5:
            raise SystemExit(f"{layout} does not go on as it should")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["ddp", "fsdp2", "zero3"])
