"""Runs as people read them: one run's status, the list of a folder, the closing lines after a run."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from shlex import quote
from typing import Any

from . import actual, backends, record
from .errors import RunError
from .plan import Plan
from .run_folder import RunFolder

# Besides the loss, where the objective has them: how they are written.
FIGURES = {"perplexity": "{:.2f}", "accuracy": "{:.1%}", "margin": "{:.3f}"}


def runs_of(folder: str) -> list[dict[str, Any]]:
    """One entry per run folder and per sweep below `folder`, oldest first; runs whose process is gone are closed on the way. An entry
    with `trials` is a sweep, and its steps are trials."""
    from . import sweep_text
    from .sweep import SweepFolder

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RunError(f"{folder} is not a folder. Runs are listed from runs/ unless you name another one.")
    found: list[dict[str, Any]] = []
    runs = [RunFolder(path.parent.absolute()) for path in root.glob("*/run.json")]
    sweeps = [SweepFolder(path.parent.absolute()) for path in root.glob("*/sweep.json")]
    backends.reconcile([*runs, *(trial for sweep in sweeps for trial in sweep.trials())])
    found += [sweep_text.entry(sweep) for sweep in sweeps]
    for run in runs:
        facts = record.read(run)
        figures = facts.get("evaluation") or {}
        found.append(
            {
                "run": facts["run"],
                "state": facts["state"],
                "step": facts["step"],
                "steps": facts["steps"],
                "created": facts["created"],
                "model": facts["model"]["name"],
                "loss_before": (figures.get("before") or {}).get("loss"),
                "loss_after": (figures.get("after") or {}).get("loss"),
                "folder": str(run.root),
                "trials": None,
            }
        )
    return sorted(found, key=lambda entry: entry["created"])


def listing(found: list[dict[str, Any]], folder: str) -> str:
    if not found:
        return f"no runs in {folder}"
    rows = [("RUN", "STATE", "STEP", "HELD-OUT LOSS", "MODEL", "CREATED")]
    for entry in found:
        steps = f"{entry['step']}/{entry['steps']}" if entry["steps"] else "-"
        steps += " trials" if entry["trials"] else ""
        before, after = entry["loss_before"], entry["loss_after"]
        loss = "-" if after is None else f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"
        rows.append((entry["run"], entry["state"], steps, loss, Path(entry["model"]).name, entry["created"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def status(folder: RunFolder, facts: dict[str, Any]) -> str:
    steps = f"step {facts['step']} of {facts['steps']}" if facts["steps"] else "not begun"
    lines = [f"{facts['run']}  {facts['state']}  {steps}"]
    last = last_metrics(folder)
    if last:
        lines.append(
            f"  loss {last['loss']:.3f}, {last['tokens_per_s']:,.0f} tokens/s, peak memory {last['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
    found = measured(folder, facts)
    if found is not None:
        lines += actual.lines(found)
    for i, attempt in enumerate(facts["attempts"], 1):
        end = "" if attempt["last_step"] is None else f" to {attempt['last_step']}"
        reason = f": {attempt['reason']}" if attempt["reason"] else ""
        lines.append(
            f"  attempt {i}: {attempt['handle']}  {attempt['state']}  from step {attempt['first_step']}{end}{reason}"
        )
    return "\n".join(lines)


def measured(folder: RunFolder, facts: dict[str, Any]) -> actual.Actual | None:
    """Hours and price at the pace of the first real steps, beside the planned ones."""
    if not folder.plan.exists():
        return None
    return actual.actual(folder, Plan.model_validate_json(folder.plan.read_text(encoding="utf-8")), facts["steps"])


def last_metrics(folder: RunFolder) -> dict[str, Any] | None:
    if not folder.metrics.exists():
        return None
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    steps = (json.loads(line) for line in reversed(lines) if line.endswith("}"))
    return next((values for values in steps if "loss" in values), None)


def outcome(folder: RunFolder, facts: dict[str, Any]) -> str:
    """What came of a run: evaluation before and after with answers side by side, or why it ended early."""
    if facts["state"] == "CANCELLED":
        where = f"after step {facts['step']} of {facts['steps']}" if facts["steps"] else "before the first step"
        return f"stopped {where}; go on with: trebuchet resume {quote(str(folder.root))}"
    if facts["state"] != "SUCCEEDED":
        return f"{facts['run']} {facts['state']}: {facts['error']}"
    lines = []
    if folder.evaluation.exists():
        lines += comparison(json.loads(folder.evaluation.read_text(encoding="utf-8")))
    lines.append(f"model   {folder.model}")
    lines.append(f"record  {folder.record}")
    root = quote(str(folder.root))
    lines.append(f"next    trebuchet report {root}    trebuchet export {root} --format hf")
    return "\n".join(lines)


def comparison(figures: dict[str, Any]) -> list[str]:
    after, before = figures["after"], figures.get("before")
    lines = [""]
    for i, sample in enumerate(figures["samples"], 1):
        lines += [f"Held-out sample {i}", *block("prompt", sample["prompt"]), *block("base", sample["base"])]
        lines += [*block("tuned", sample["tuned"]), *block("reference", sample["reference"]), ""]
    if before:
        change = (after["loss"] - before["loss"]) / before["loss"]
        lines.append("held-out        before    after")
        lines.append(f"  loss        {before['loss']:8.3f} {after['loss']:8.3f}   {change:+.1%}")
        for name, form in FIGURES.items():
            if name in before and name in after:
                cells = [form.format(values[name]).rjust(8) for values in (before, after)]
                lines.append(f"  {name:<11} {cells[0]} {cells[1]}")
    else:
        others = [f", {name} {form.format(after[name])}" for name, form in FIGURES.items() if name in after]
        lines.append(f"held-out loss {after['loss']:.3f}{''.join(others)}")
    lines += ["", *(f"  {sentence}" for sentence in figures.get("verdicts", []))]
    if figures.get("forgetting") and figures["forgetting"]["kl_nats"] is not None:
        kl = figures["forgetting"]
        lines.append(
            f"  away from the base on general prompts: {kl['kl_nats']:.3f} nats a token ({kl['prompts']} prompts)"
        )
    lines += [f"  {name}: {value:.4g}" for name, value in (figures.get("harness") or {}).items()]
    if figures.get("verdict"):
        lines.append(f"verdict: {figures['verdict']}")
    return [*lines, ""]


def block(name: str, text: str, most: int = 12) -> list[str]:
    """A labelled, indented paragraph of at most `most` lines."""
    lines = [piece for line in text.splitlines() for piece in (textwrap.wrap(line, 100, drop_whitespace=False) or [""])]
    if len(lines) > most:
        lines = [*lines[: most - 1], f"… ({len(lines) - most + 1} more lines)"]
    return [f"  {name if i == 0 else '':<9} | {line}" for i, line in enumerate(lines or [""])]
