"""Several runs side by side: their curves in one chart, their settings on parallel axes, and which setting went with the loss.

Importance is Spearman's rank correlation of a setting with the final held-out loss over the runs: what went along with it, not what
caused it; below six runs it is noise and left out. Left out: runs of different data, whose losses do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .collect import Run
from .figure import Chart, axes, columns, line, plain

FEWEST = 6
SETTINGS = {
    "learning rate": ("chosen", "learning_rate"),
    "global batch": ("config", "optimization", "global_batch_size"),
    "epochs": ("config", "optimization", "epochs"),
    "warm-up": ("config", "optimization", "warmup"),
    "weight decay": ("config", "optimization", "weight_decay"),
    "rank": ("config", "strategy", "lora", "r"),
    "alpha": ("config", "strategy", "lora", "alpha"),
    "dropout": ("config", "strategy", "lora", "dropout"),
    "max length": ("config", "data", "max_length"),
    "seed": ("config", "optimization", "seed"),
    "method": ("chosen", "method"),
}
COLOURS = ("first", "second", "third", "fourth", "fifth")


def final_loss(run: Run) -> float | None:
    after = ((run.record.get("evaluation") or {}).get("after") or {}).get("loss")
    if after is not None:
        return float(after)
    held = [e["eval_loss"] for e in run.evaluations if "eval_loss" in e]
    return float(held[-1]) if held else None


def setting(run: Run, path: Sequence[str]) -> Any:
    here: Any = {"chosen": run.chosen, "config": run.config}
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    return here


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs."""
    found = {name: [setting(run, path) for run in runs] for name, path in SETTINGS.items()}
    return {name: values for name, values in found.items() if len(set(map(str, values))) > 1}


def of_runs(runs: Sequence[Run]) -> list[Chart]:
    made = [curves(runs), parallel(runs), importance(runs)]
    return [chart for chart in made if chart is not None]


def curves(runs: Sequence[Run]) -> Chart | None:
    data, rows = [], []
    for i, run in enumerate(runs):
        held = [(e["step"], e["eval_loss"]) for e in run.evaluations if "eval_loss" in e]
        points = held or [(s["step"], s["loss"]) for s in run.steps]
        if points:
            dash = ("solid", "dash", "dot", "dashdot")[i // len(COLOURS) % 4]
            trace = line(run.name, *columns(points), COLOURS[i % len(COLOURS)])
            trace["line"]["dash"] = dash
            data.append(trace | {"meta": run.name})
            rows.append((run.name, points[-1][0], f"{points[-1][1]:.4f}"))
    if not data:
        return None
    best = min(rows, key=lambda row: float(row[2]))
    alt = f"Held-out loss of {len(data)} runs; lowest at the end is {best[2]}, of {best[0]}."
    return Chart(
        id="curves",
        title="Held-out loss of all runs",
        alt=alt,
        data=data,
        layout=axes("step", "loss (nats per token)"),
        columns=("run", "last step", "loss"),
        rows=rows,
    )


def parallel(runs: Sequence[Run]) -> Chart | None:
    """Parallel coordinates of the settings that differ, coloured by the loss."""
    scored = [(run, loss) for run in runs if (loss := final_loss(run)) is not None]
    settings = differing([run for run, _ in scored]) if len(scored) >= 3 else {}
    if not settings:
        return None
    losses = [loss for _, loss in scored]
    scales = {name: scale(values) for name, values in [*settings.items(), ("held-out loss", losses)]}
    best = min(range(len(scored)), key=losses.__getitem__)
    data, names = [], list(scales)
    for i, (run, loss) in enumerate(scored):
        heights = [scales[name][0][i] for name in names]
        trace = line(
            run.name, list(range(len(names))), heights, "first" if i == best else "muted", mode="lines+markers"
        )
        trace["line"]["width"] = 3 if i == best else 1
        data.append(trace | {"meta": run.name, "hovertemplate": plain(f"{run.name}: {loss:.4f}") + "<extra></extra>"})
    data.append(data.pop(best))  # drawn last, over the others
    labels = [
        {"x": at, "y": y, "text": plain(text), "showarrow": False, "yanchor": anchor, "font": {"size": 11}}
        for at, name in enumerate(names)
        for y, text, anchor in ((-0.04, scales[name][1], "top"), (1.04, scales[name][2], "bottom"))
    ]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [plain(name) for name in names],
            "side": "top",
            "range": [-0.3, len(names) - 0.7],
        },
        "yaxis": {"visible": False, "range": [-0.16, 1.16]},
        "annotations": labels,
        "showlegend": False,
        "height": 360,
        "margin": {"l": 20, "r": 20, "t": 40, "b": 20},
    }
    rows = [
        (run.name, *(values[i] for values in settings.values()), f"{loss:.4f}") for i, (run, loss) in enumerate(scored)
    ]
    alt = f"Settings that differ between {len(scored)} runs ({', '.join(settings)}) on parallel axes; "
    alt += f"{scored[best][0].name} has the lowest loss."
    note = f"Each line is a run, from setting to loss; the thick one, {scored[best][0].name}, ended lowest."
    columns = ("run", *settings, "held-out loss")
    return Chart(
        id="parallel",
        title="Settings and loss",
        alt=alt,
        data=data,
        columns=columns,
        rows=rows,
        layout=layout,
        note=note,
    )


def scale(values: Sequence[Any]) -> tuple[list[float], str, str]:
    """(heights from 0 to 1, text at the bottom, text at the top): numbers over their range, by logarithm where it spans more than a
    factor of 20; words by their place in the sorted list."""
    if all(isinstance(v, (int, float)) for v in values):
        low, high = min(values), max(values)
        by_log = low > 0 and high / low > 20
        numbers = [math.log(v) if by_log else float(v) for v in values]
        texts = f"{low:.4g}", f"{high:.4g}"
    else:
        words = sorted({str(v) for v in values})
        numbers, texts = [float(words.index(str(v))) for v in values], (words[0], words[-1])
    span = max(numbers) - min(numbers)
    return [(n - min(numbers)) / span if span else 0.5 for n in numbers], *texts


def importance(runs: Sequence[Run]) -> Chart | None:
    scored = [(run, loss) for run in runs if (loss := final_loss(run)) is not None]
    if len(scored) < FEWEST:
        return None
    losses = [loss for _, loss in scored]
    found = {}
    for name, values in differing([run for run, _ in scored]).items():
        if all(isinstance(v, (int, float)) for v in values):
            found[name] = spearman([float(v) for v in values], losses)
    if not found:
        return None
    order = sorted(found, key=lambda name: abs(found[name]))
    colours = ["bad" if found[name] > 0 else "good" for name in order]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": order,
            "x": [found[n] for n in order],
            "marker": {"color": colours},
            "name": "correlation",
        }
    ]
    alt = "Rank correlation with the held-out loss: " + ", ".join(f"{n} {found[n]:+.2f}" for n in reversed(order)) + "."
    note = f"Spearman's rank correlation over {len(scored)} runs; above zero: larger values went with a higher loss."
    return Chart(
        id="importance",
        title="Which setting went with the loss",
        alt=alt,
        data=data,
        layout={"xaxis": {"range": [-1, 1], "title": {"text": "rank correlation"}}, "height": 120 + 36 * len(order)},
        columns=("setting", "rank correlation"),
        rows=[(n, f"{found[n]:+.3f}") for n in reversed(order)],
        note=note,
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation with ties at their mean rank; 0 where one side is constant."""
    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    bottom = (sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y)) ** 0.5
    return top / bottom if bottom else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop + 1 < len(order) and values[order[stop + 1]] == values[order[start]]:
            stop += 1
        for at in order[start : stop + 1]:
            out[at] = (start + stop) / 2
        start = stop + 1
    return out
