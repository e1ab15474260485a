"""How far the memory estimate is from published measurements; writes the tables of docs/accuracy.md.

    python benchmarks/memory_accuracy.py            print the tables
    python benchmarks/memory_accuracy.py --write    put them into docs/accuracy.md, between its two markers
    python benchmarks/memory_accuracy.py --rows     every row: measured, estimated, error

Every run of tests/strategies/data is asked for exactly once, with the settings of its row and nothing else; the rows
with `core = no` are scored apart. Needs no torch and takes under a second.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trebuchet.launcher.planner import GPU_MARGIN
from trebuchet.strategies.memory import GIB, MemoryEstimate, MemoryRequest, estimate

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "strategies" / "data"
PAGE = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
MODEL_COLUMNS = (
    "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
    "num_experts", "experts_per_token",
)  # fmt: skip
TEXT_COLUMNS = (
    "method", "objective", "precision", "optimizer", "parallel", "offload", "checkpointing", "attention", "kernels",
)  # fmt: skip
# Taken over from a comparison on these rows; their programs are not run here.
OTHERS = (
    ("fitcheck-llm", "60 % of the rows", "18 % (2 % on one T4 with plain kernels, where it was measured)"),
    ("accelerate, size of the weights x 4", "all", "34 %"),
    ("Unsloth Studio's estimate", "all", "41 %"),
    ("LLaMA-Factory's table", "all", "66 %"),
)
WHY = {
    "PowerLM-3B": "transformers 4.45 frees the 16-bit logits before the loss (12 bytes a logit); later versions, and "
    "the formula, keep them (14)",
    "LG-012": "LitGPT's 4-bit linear kept one copy of each input in 2023 and two in 2024; the formula takes 1.75",
    "LG-013": "as LG-012",
    "LG-074": "as LG-012, and every layer has an adapter",
}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One measurement beside its estimate, both in GiB of the meter that was read.

    `derived`: no constant marked "fitted" enters the estimate (live bytes, neither LitGPT's modules nor ZeRO's buckets).
    """

    name: str
    model: str
    source: str
    region: str
    core: bool
    derived: bool
    measured: float
    estimated: float

    @property
    def error(self) -> float:
        """(estimated - measured) / measured."""
        return self.estimated / self.measured - 1


def request_of(row: dict[str, str]) -> MemoryRequest:
    """The settings of a row as `estimate --json` would get them."""
    model: dict[str, object] = {name: int(row[name]) for name in MODEL_COLUMNS if row[name]}
    model["tie_word_embeddings"] = row["tie_word_embeddings"] == "yes"
    settings: dict[str, object] = {name: row[name] for name in TEXT_COLUMNS}
    for name in ("gpus", "seq_len", "micro_batch"):
        settings[name] = int(row[name])
    settings["packed"] = row["packed"] == "yes"
    settings["lora_r"] = int(row["lora_r"]) if row["lora_r"] else None
    settings["lora_targets"] = row["lora_targets"].split(",") if row["lora_targets"] else None
    settings["double_quant"] = {"yes": True, "no": False, "": None}[row["double_quant"]]
    return MemoryRequest.from_dict({"model": model, **settings})


def read(name: str) -> list[dict[str, str]]:
    """The rows of one data file."""
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores() -> list[Scored]:
    """Every calibration row, estimated."""
    return [
        Scored(
            name=row["id"],
            model=row["model"],
            source=row["source"].split(",")[0],
            region=row["region"].split(";")[0],
            core=row["core"] == "yes",
            derived=row["meter"] == "allocated" and row["kernels"] != "chunked-ce" and "zero" not in row["parallel"],
            measured=float(row["measured_gib"]),
            estimated=_meter(estimate(request_of(row)), row["meter"]) / GIB,
        )
        for row in read("calibration.csv")
    ]


def _meter(found: MemoryEstimate, meter: str) -> int:
    return found.peak_allocated_bytes if meter == "allocated" else found.peak_reserved_bytes


def decisions() -> list[tuple[str, str, str, float, float]]:
    """(row, published verdict, ours, GiB needed, GiB of the card) for every row of the boundary pairs."""
    out = []
    for row in read("boundary.csv"):
        needed, card = estimate(request_of(row)).process_bytes / GIB, float(row["gpu_memory_gib"])
        out.append((row["id"], row["verdict"], "fits" if needed <= card else "oom", needed, card))
    return out


def of_planner(needed: float, card: float) -> str:
    """The verdict of `trebuchet plan`, which keeps a margin."""
    return "fits" if needed <= card * GPU_MARGIN else "oom"


def summary(rows: Sequence[Scored]) -> tuple[float, float, float, float]:
    """(mean absolute error, share within 5 %, most negative error, most positive error)."""
    errors = [row.error for row in rows]
    within = sum(abs(error) <= 0.05 for error in errors) / len(errors)
    return statistics.mean(map(abs, errors)), within, min(errors), max(errors)


def tables() -> str:
    """The generated part of docs/accuracy.md."""
    rows = scores()
    core = [row for row in rows if row.core]
    lines = [
        "| rows | n | mean absolute error | within 5 % | lowest | highest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups: list[tuple[str, list[Scored]]] = [("**all core rows**", core)]
    groups.append(("of these, without any fitted constant", [row for row in core if row.derived]))
    for key in ("region", "source"):
        names = sorted({getattr(row, key) for row in core})
        groups += [(name, [row for row in core if getattr(row, key) == name]) for name in names]
    groups.append(("rows with inexact settings (core = no)", [row for row in rows if not row.core]))
    lines += [_line(name, group) for name, group in groups]
    lines += ["", "| predictor on the same rows | answers | mean absolute error |", "| --- | --- | --- |"]
    lines.append(f"| this one | all | {100 * summary(core)[0]:.2f} % |")
    lines += [f"| {name} | {answers} | {error} |" for name, answers, error in OTHERS]
    right = decisions()
    correct = sum(verdict == ours for _, verdict, ours, _, _ in right)
    planned = sum(verdict == of_planner(needed, card) for _, verdict, _, needed, card in right)
    lines += [
        "",
        f"Fit or not: {correct} of {len(right)} rows of the 16 boundary pairs are decided right by the estimate against the",
    ]
    lines += [f"whole card; {planned} of {len(right)} by the planner, which fills {100 * GPU_MARGIN:.1f} % of it.", ""]
    lines += ["| missed by more than 5 % | measured GiB | estimated GiB | error | reason |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for row in sorted(core, key=lambda row: -abs(row.error)):
        if abs(row.error) > 0.05:
            reason = WHY.get(row.name) or WHY.get(row.model) or "not understood"
            shown = f"{row.name}, {row.model}"
            lines.append(
                f"| {shown} | {row.measured:.2f} | {row.estimated:.2f} | {100 * row.error:+.1f} % | {reason} |"
            )
    return "\n".join(lines)


def _line(name: str, group: Sequence[Scored]) -> str:
    mean, within, low, high = (100 * value for value in summary(group))
    return f"| {name} | {len(group)} | {mean:.2f} % | {within:.0f} % | {low:+.1f} % | {high:+.1f} % |"


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/accuracy.md")
    parser.add_argument("--rows", action="store_true", help="print every row")
    options = parser.parse_args()
    if options.rows:
        for row in scores():
            mark = "" if row.core else "  (core = no)"
            print(
                f"{row.name}  {row.model:28} {row.measured:8.2f} {row.estimated:8.2f} {100 * row.error:+6.1f} %{mark}"
            )
    elif options.write:
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
