"""Memory of a run, predicted beside measured: by phase, and what the predicted peak is made of.

On a GPU both are PyTorch's allocated bytes. On a CPU the measured one is the resident memory of the whole process, so the plan's
allowance for interpreter and libraries is added to each predicted phase; how far memory that was freed is in it, the note says.
"""

from __future__ import annotations

from .collect import GIB, Run
from .figure import Chart

PHASES = {
    "load": "load",
    "forward_backward": "forward and backward",
    "optimizer_step": "optimizer step",
    "checkpoint_save": "checkpoint save",
}

GIVEN_BACK = (
    "Optimizer step and save are those of the first steps, before which freed memory was given back to the system; in the other "
    "phases memory that was freed may still be resident."
)
RESIDENT = (
    "Memory that was freed stays resident, so optimizer step and save show what the phase before them held: only the largest bar "
    "is a measurement of its phase."
)


def phases(run: Run) -> Chart | None:
    """Two bars a phase."""
    memory, measured = run.chosen.get("memory") or {}, run.record.get("measured_memory") or {}
    found = measured.get("phases_gib") or {}
    if not memory.get("phases") or not found:
        return None
    cpu = measured["what"] == "resident"
    allowance = memory["process_gib"] - memory["peak_allocated_gib"] if cpu else 0.0
    names = [name for name in PHASES if name in memory["phases"]]
    labels = [PHASES[name] for name in names]
    short = [label.replace(" ", "<br>") for label in labels]  # narrow enough for a phone
    predicted = [memory["phases"][name] + allowance for name in names]
    real = [found.get(name) for name in names]
    data = [
        {"type": "bar", "name": "predicted", "x": short, "y": predicted, "marker": {"color": "first"}},
        {"type": "bar", "name": "measured", "x": short, "y": real, "marker": {"color": "second"}},
    ]
    rows = [
        (label, f"{p:.3f}", "" if m is None else f"{m:.3f}", "" if m is None else f"{(p - m) / m:+.0%}")
        for label, p, m in zip(labels, predicted, real, strict=True)
    ]
    said = [
        f"{label} {p:.2f} predicted, {m:.2f} measured" for label, p, m in zip(labels, predicted, real, strict=True) if m
    ]
    note = "The largest of all ranks, as PyTorch allocated it; each phase has its own peak."
    if cpu:
        note = (
            f"Resident memory of the largest process; {measured['before_gib']:.2f} GiB of it, mostly libraries, were there before "
            f"loading began, and the plan allows {allowance:.2f} for that. "
        )
        note += GIVEN_BACK if measured.get("given_back") else RESIDENT
    return Chart(
        id="phases",
        title="Memory by phase",
        alt=f"Peak memory of a rank in GiB by phase: {'; '.join(said)}.",
        data=data,
        layout={"barmode": "group", "yaxis": {"title": {"text": "GiB per rank"}}, "xaxis": {"tickangle": 0}},
        columns=("phase", "predicted GiB", "measured GiB", "difference"),
        rows=rows,
        note=note,
    )


def memory(run: Run) -> Chart | None:
    """A bar for each part of the predicted peak, their sum, and what was measured."""
    predicted = (run.chosen.get("memory") or {}).get("components") or {}
    measured = max((s.get("peak_memory_bytes", 0) for s in run.steps), default=0) / GIB
    if not predicted:
        return None
    parts = sorted(((k, v) for k, v in predicted.items() if v > 0.005), key=lambda item: -item[1])
    total = sum(v for _, v in parts)
    usable = run.chosen["memory"].get("usable_gib")
    alt = (
        f"Predicted memory of a rank: {total:.2f} GiB in {len(parts)} parts, largest {parts[0][0] if parts else 'none'}"
    )
    alt += f"; measured peak {measured:.2f} GiB" if measured else ""
    rows = [(k.replace("_", " "), f"{v:.3f}") for k, v in parts] + [("predicted, sum", f"{total:.3f}")]
    rows += [("measured peak", f"{measured:.3f}")] if measured else []
    bars = [(k.replace("_", " "), v, "first") for k, v in parts] + [("predicted, sum", total, "muted")]
    bars += [("measured peak", measured, "second")] if measured else []
    names, values, colours = zip(*bars, strict=True)
    data = [{"type": "bar", "orientation": "h", "name": "GiB", "y": names, "x": values, "marker": {"color": colours}}]
    note = f"{usable:.1f} GiB are usable." if usable else ""
    if not (run.record.get("measured_memory") or {"by_phase": True})["by_phase"]:
        note += " Peaks of single phases are not shown: this system cannot reset the mark of resident memory."
    if run.chosen.get("device") == "cpu" and measured:
        note += " On a CPU the measured number is the whole process, libraries included."
    layout = {
        "xaxis": {"title": {"text": "GiB per rank"}},
        "yaxis": {"autorange": "reversed"},
        "height": 120 + 26 * len(bars),
    }
    return Chart(
        id="memory",
        title="What the predicted peak is made of",
        alt=alt + ".",
        data=data,
        layout=layout,
        columns=("part", "GiB"),
        rows=rows,
        note=note.strip(),
    )
