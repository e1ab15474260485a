"""The figures of one run: loss, learning rate, gradient, speed, attempts, lengths; those of memory are in `charts_memory.py`.

What a figure is stands in `figure.py`. Left out: several runs (`compare.py`).
"""

from __future__ import annotations

from typing import Any

from .charts_memory import memory, phases
from .collect import Run, attempt_seconds
from .figure import Chart, axes, columns, line, plain, sampled

VERDICTS = {"better": "good", "worse": "bad"}
NO_SHARES = ("loss", "perplexity", "bits_per_byte", "margin", "reward_chosen", "reward_rejected", "tokens")
STATES = {"SUCCEEDED": "good", "RUNNING": "first", "CANCELLED": "muted", "PREEMPTED": "second", "PENDING": "muted"}


def of_run(run: Run) -> list[Chart]:
    figures = (loss, speed, rate, gradient, timeline, compared, evaluations, margin, moved, phases, memory, lengths)
    return [chart for figure in figures if (chart := figure(run)) is not None]


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
        data.append(line("held-out loss", *columns(held), "second", mode="lines+markers"))
    first, last = run.steps[0], run.steps[-1]
    alt = f"Training loss falls from {first['loss']:.3f} at step {first['step']} to {last['loss']:.3f} at step {last['step']}"
    alt = alt.replace("falls", "goes") if last["loss"] > first["loss"] else alt
    alt += f"; held-out loss goes from {held[0][1]:.3f} to {held[-1][1]:.3f}." if held else "."
    layout = axes("step", run.loss_label, shapes=restarts(run))
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
    return _curve([s for s in run.steps if key in s], key, name, title, axis, colour)


def margin(run: Run) -> Chart | None:
    """Of pairs: how far the chosen side is ahead on the held-out rows."""
    found = [e for e in run.evaluations if "eval_margin" in e]
    return _curve(found, "eval_margin", "margin", "Held-out margin while it trains", "chosen over rejected", "third")


def moved(run: Run) -> Chart | None:
    """Where the divergence from the base chooses the weights, it is measured on the way."""
    found = [e for e in run.evaluations if "kl_nats" in e]
    title = "Away from the base while it trains"
    return _curve(found, "kl_nats", "moved", title, "nats per token, on general prompts", "fourth")


def _curve(found: list[dict[str, Any]], key: str, name: str, title: str, axis: str, colour: str) -> Chart | None:
    if not found:
        return None
    values = [s[key] for s in found]
    alt = f"{title}, {len(found)} times measured: between {min(values):.3g} and {max(values):.3g}, {values[-1]:.3g} at the end."
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
    layout["yaxis"]["tickformat"] = ",.4~r"
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


def compared(run: Run) -> Chart | None:
    """Base against tuned: each figure's change as a share of the base's, with its interval; beside the table of the figures."""
    found = {
        name.replace("_", " "): one
        for name, one in ((run.record.get("evaluation") or {}).get("compared") or {}).items()
        if one["difference"] is not None and one["before"]
    }
    if not found:
        return None
    share = lambda one, key: 100 * one[key] / abs(one["before"])  # noqa: E731
    colours = [VERDICTS.get(one["verdict"], "muted") for one in found.values()]
    middle = [share(one, "difference") for one in found.values()]
    bars = {
        "type": "data", "symmetric": False, "color": "ink", "thickness": 2,
        "array": [share(one, "high") - at for one, at in zip(found.values(), middle, strict=True)],
        "arrayminus": [at - share(one, "low") for one, at in zip(found.values(), middle, strict=True)],
    }  # fmt: skip
    data = {
        "type": "bar", "orientation": "h", "name": "change", "y": [plain(name) for name in found], "x": middle,
        "marker": {"color": colours}, "error_x": bars,
    }  # fmt: skip
    rows = [
        (
            name,
            f"{share(one, 'difference'):+.1f} %",
            f"{share(one, 'low'):+.1f} to {share(one, 'high'):+.1f} %",
            one["verdict"],
        )
        for name, one in found.items()
    ]
    said = ", ".join(f"{row[0]} {row[1]} ({row[3]})" for row in rows)
    return Chart(
        id="compared",
        title="Base against tuned",
        alt=f"Change from base to tuned on the held-out rows: {said}.",
        data=[data],
        layout={
            "xaxis": {"title": {"text": "change in % of the base's figure"}},
            "yaxis": {"autorange": "reversed"},
            "height": 120 + 40 * len(rows),
        },
        columns=("figure", "change", "95% interval", "verdict"),
        rows=rows,
        note="Green is better, red is worse, grey cannot be told apart; the thin lines are 95% intervals.",
    )


def evaluations(run: Run) -> Chart | None:
    """The held-out shares while it trains: accuracy, and metrics of answers where one chooses the weights."""
    shares: dict[str, list[tuple[int, float]]] = {}
    for values in run.evaluations:
        for key, value in values.items():
            name = key.removeprefix("eval_")
            if key.startswith("eval_") and name not in NO_SHARES and isinstance(value, (int, float)):
                shares.setdefault(name, []).append((values["step"], value))
    before = (run.figures.get("before") or {}).get("accuracy")
    if before is not None and "accuracy" in shares:
        shares["accuracy"].insert(0, (0, before))
    if not shares:
        return None
    colours = ("first", "second", "third", "fourth", "fifth")
    data = [
        line(name, *columns(points), colours[i % 5], mode="lines+markers")
        for i, (name, points) in enumerate(shares.items())
    ]
    said = [f"{name} goes from {points[0][1]:.1%} to {points[-1][1]:.1%}" for name, points in shares.items()]
    rows = [(name, step, f"{value:.2%}") for name, points in shares.items() for step, value in points]
    return Chart(
        id="evaluations",
        title="Held-out accuracy while it trains",
        alt=f"On the held-out rows {', '.join(said)}.",
        data=data,
        layout=axes("step", "share", showlegend=len(data) > 1)
        | {"yaxis": {"title": {"text": "share"}, "tickformat": ".1~%"}},
        columns=("figure", "step", "share"),
        rows=rows,
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
