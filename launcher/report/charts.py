"""The figures of one run, as plotly's own JSON: each with an id, a title, a sentence for those who cannot see it, and its table.

Colours are names that page.js turns into those of the light or dark page. Left out: plotly itself, which draws in the browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .collect import GIB, Run, attempt_seconds

STATES = {"SUCCEEDED": "good", "RUNNING": "first", "CANCELLED": "muted", "PREEMPTED": "second", "PENDING": "muted"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    id: str
    title: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    note: str = ""

    def figure(self) -> dict[str, Any]:
        return {"id": self.id, "data": self.data, "layout": self.layout}


def of_run(run: Run) -> list[Chart]:
    made = (loss(run), rate(run), gradient(run), speed(run), timeline(run), memory(run), lengths(run))
    return [chart for chart in made if chart is not None]


def line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, **more: Any) -> dict[str, Any]:
    mode = "lines+markers" if len(x) < 30 else "lines"
    return {
        "type": "scatter",
        "mode": mode,
        "name": plain(name),
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": 2},
        **more,
    }


def plain(text: str) -> str:
    """Plotly takes some tags in names and labels; a user's words are not tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **more}


def restarts(run: Run) -> list[dict[str, Any]]:
    """A vertical line where an attempt after the first began."""
    shapes = []
    for attempt in run.attempts[1:]:
        at = attempt.get("first_step") or 0
        shapes.append(
            {
                "type": "line",
                "x0": at,
                "x1": at,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": "muted", "dash": "dot"},
            }
        )
    return shapes


def loss(run: Run) -> Chart | None:
    if not run.steps:
        return None
    data = [line("training loss", [s["step"] for s in run.steps], [s["loss"] for s in run.steps], "first")]
    held = [(e["step"], e["eval_loss"]) for e in run.evaluations if "eval_loss" in e]
    before = (run.figures.get("before") or {}).get("loss")
    held = ([(0, before)] if before is not None else []) + held
    if held:
        data.append(line("held-out loss", *zip(*held, strict=True), "second", mode="lines+markers"))  # type: ignore[arg-type]
    first, last = run.steps[0], run.steps[-1]
    alt = f"Training loss falls from {first['loss']:.3f} at step {first['step']} to {last['loss']:.3f} at step {last['step']}"
    alt = alt.replace("falls", "goes") if last["loss"] > first["loss"] else alt
    alt += f"; held-out loss goes from {held[0][1]:.3f} to {held[-1][1]:.3f}." if held else "."
    layout = axes("step", "loss (nats per token)", shapes=restarts(run))
    rows = [
        (s["step"], f"{s['loss']:.4f}", next((f"{v:.4f}" for at, v in held if at == s["step"]), ""))
        for s in sampled(run.steps)
    ]
    note = "Dotted lines: the run was started again there." if layout["shapes"] else ""
    return Chart(
        id="loss",
        title="Loss",
        alt=alt,
        data=data,
        layout=layout,
        columns=("step", "training", "held-out"),
        rows=rows,
        note=note,
    )


def rate(run: Run) -> Chart | None:
    return _simple(run, "lr", "rate", "Learning rate", "learning rate", "third")


def gradient(run: Run) -> Chart | None:
    return _simple(run, "grad_norm", "gradient", "Gradient norm", "norm before clipping", "second")


def _simple(run: Run, key: str, name: str, title: str, axis: str, colour: str) -> Chart | None:
    found = [s for s in run.steps if key in s]
    if not found:
        return None
    values = [s[key] for s in found]
    alt = f"{title} over {len(found)} steps: between {min(values):.3g} and {max(values):.3g}, {values[-1]:.3g} at the end."
    rows = [(s["step"], f"{s[key]:.4g}") for s in sampled(found)]
    data = [line(title, [s["step"] for s in found], values, colour)]
    return Chart(id=name, title=title, alt=alt, data=data, layout=axes("step", axis), columns=("step", axis), rows=rows)


def speed(run: Run) -> Chart | None:
    found = [s for s in run.steps if "tokens_per_s" in s]
    if not found:
        return None
    values = [s["tokens_per_s"] for s in found]
    data = [line("tokens/s", [s["step"] for s in found], values, "first")]
    layout = axes("step", "tokens per second", showlegend=False)
    planned = (run.chosen.get("time") or {}).get("tokens_per_s")
    alt = f"Tokens per second over {len(found)} steps: {values[-1]:,.0f} at the end, at most {max(values):,.0f}"
    columns, rows = ["step", "tokens/s"], [[s["step"], f"{s['tokens_per_s']:,.0f}"] for s in sampled(found)]
    note = "MFU is not shown: the cluster file has no peak FLOP/s for this device and precision."
    if run.peak_flops:
        share = run.mfu(values[-1]) or 0.0
        alt += f", which is {share:.1%} of the hardware's peak"
        columns.append("MFU")
        for row, step in zip(rows, sampled(found), strict=True):
            row.append(f"{run.mfu(step['tokens_per_s']) or 0:.1%}")
        note = f"MFU {share:.1%} at the end: 6 N floating-point operations a token for full fine-tuning, 4 N with a frozen base."
    if planned:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": planned,
                "y1": planned,
                "line": {"color": "muted", "dash": "dash"},
            }
        ]
        note = f"Dashed: {planned:,.0f} planned. " + note
    return Chart(
        id="speed", title="Speed", alt=alt + ".", data=data, layout=layout, columns=columns, rows=rows, note=note
    )


def timeline(run: Run) -> Chart | None:
    """Attempts as bars over wall-clock time, so that restarts and waiting are seen."""
    begun = [a for a in run.attempts if a.get("started")]
    if not begun:
        return None
    data = []
    for number, attempt in enumerate(begun, 1):
        data.append(
            {
                "type": "bar", "orientation": "h", "name": attempt["state"], "y": [f"attempt {number}"], "base": [attempt["started"]],
                "x": [attempt_seconds(attempt) * 1000], "marker": {"color": STATES.get(attempt["state"], "bad")},
                "text": [attempt["state"]], "hovertemplate": "%{text}<extra></extra>", "textposition": "inside",
            }
        )  # fmt: skip
    rows = [
        (
            n,
            a["state"],
            a["started"],
            a.get("ended") or "",
            a.get("first_step"),
            a.get("last_step"),
            a.get("reason") or "",
        )
        for n, a in enumerate(begun, 1)
    ]
    ends = ", ".join(f"attempt {n} {a['state']}" for n, a in enumerate(begun, 1))
    layout = {
        "xaxis": {"type": "date"},
        "yaxis": {"autorange": "reversed"},
        "showlegend": False,
        "barmode": "overlay",
        "height": 120 + 44 * len(begun),
    }
    columns = ("attempt", "state", "started", "ended", "from step", "to step", "reason")
    return Chart(
        id="timeline",
        title="Attempts",
        alt=f"{len(begun)} attempts over time: {ends}.",
        data=data,
        layout=layout,
        columns=columns,
        rows=rows,
    )


def memory(run: Run) -> Chart | None:
    """Predicted parts of the peak as one stacked bar beside what was measured."""
    predicted = (run.chosen.get("memory") or {}).get("components") or {}
    measured = max((s.get("peak_memory_bytes", 0) for s in run.steps), default=0) / GIB
    if not predicted:
        return None
    parts = sorted(((k, v) for k, v in predicted.items() if v > 0.005), key=lambda item: -item[1])
    shades = ("first", "second", "third", "fourth", "fifth", "muted", "good")
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": k.replace("_", " "),
            "y": ["predicted"],
            "x": [v],
            "marker": {"color": shades[i % 7]},
        }
        for i, (k, v) in enumerate(parts)
    ]
    if measured:
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": "measured peak",
                "y": ["measured"],
                "x": [measured],
                "marker": {"color": "ink"},
            }
        )
    total = sum(v for _, v in parts)
    usable = run.chosen["memory"].get("usable_gib")
    alt = (
        f"Predicted memory of a rank: {total:.2f} GiB in {len(parts)} parts, largest {parts[0][0] if parts else 'none'}"
    )
    alt += f"; measured peak {measured:.2f} GiB" if measured else ""
    rows = [(k.replace("_", " "), f"{v:.3f}") for k, v in parts] + [("predicted, sum", f"{total:.3f}")]
    rows += [("measured peak", f"{measured:.3f}")] if measured else []
    note = f"{usable:.1f} GiB are usable." if usable else ""
    if run.chosen.get("device") == "cpu" and measured:
        note += " On a CPU the measured number is the whole process, libraries included."
    layout = {"barmode": "stack", "xaxis": {"title": {"text": "GiB per rank"}}, "height": 300}
    return Chart(
        id="memory",
        title="Memory",
        alt=alt + ".",
        data=data,
        layout=layout,
        columns=("part", "GiB"),
        rows=rows,
        note=note.strip(),
    )


def lengths(run: Run) -> Chart | None:
    found = ((run.record.get("data") or {}).get("train") or {}).get("histogram")
    if not found:
        return None
    names = [f"up to {upper}" for upper, _ in found]
    data = [{"type": "bar", "name": "samples", "x": names, "y": [n for _, n in found], "marker": {"color": "third"}}]
    alt = (
        "Lengths of training samples in tokens: "
        + ", ".join(f"{n} {name}" for name, (_, n) in zip(names, found, strict=True))
        + "."
    )
    return Chart(
        id="lengths",
        title="Lengths of training samples",
        alt=alt,
        data=data,
        layout=axes("tokens", "samples"),
        columns=("tokens", "samples"),
        rows=[(n, c) for n, (_, c) in zip(names, found, strict=True)],
    )


def sampled(steps: Sequence[dict[str, Any]], most: int = 25) -> list[dict[str, Any]]:
    """Rows for a table that a person reads."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
