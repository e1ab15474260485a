"""Whole-process times of `trebuchet --help` and `trebuchet plan` on the demo: medians over several runs, and what they import.

    python benchmarks/startup.py [RUNS]

Targets: 0.25 s and 0.6 s. `accelerate launch --help` and `import torch` are timed beside them, for scale on the same machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREBUCHET = [sys.executable, "-m", "trebuchet.launcher.cli"]
# A table name stands for the demo's model, so that this runs without having converted it; sizes are the same.
PLAN = [*TREBUCHET, "plan", str(ROOT / "examples/demo.yaml"), "--set", "model=HuggingFaceTB/SmolLM2-135M-Instruct"]
COMMANDS = {
    "trebuchet --help": [*TREBUCHET, "--help"],
    "trebuchet plan examples/demo.yaml": PLAN,
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "accelerate launch --help": [sys.executable, "-m", "accelerate.commands.launch", "--help"],
}
HEAVY = ("torch", "ray", "transformers", "datasets", "bitsandbytes")


def main(runs: int) -> None:
    for name, command in COMMANDS.items():
        taken = []
        for _ in range(runs):
            began = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            taken.append(time.perf_counter() - began)
        print(f"{name:<36} median {statistics.median(taken):.3f} s   min {min(taken):.3f}   max {max(taken):.3f}")
    program = "import sys; from trebuchet.launcher import cli; cli.main(sys.argv[1:]); print([m for m in %r if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program % (HEAVY,), *PLAN[3:]], capture_output=True, text=True, check=True
    )
    print("heavy modules that plan imported:", done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
