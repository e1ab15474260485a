"""Several runs side by side: their curves in one chart, their settings on parallel axes, and which setting went with the loss.

Importance is Spearman's rank correlation of a setting with the final held-out loss over the runs, or of a sweep's key with its
metric over the trials: what went along with it, not what caused it; below six runs it is noise and left out. Left out: runs of
different data, whose losses do not compare.
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
        layout=axes("step", labels.pop() if len(labels := {run.loss_label for run in runs}) == 1 else "loss"),
        columns=("run", "last step", "loss"),
        rows=rows,
    )


def parallel(runs: Sequence[Run]) -> Chart | None:
    """Parallel coordinates of the settings that differ, and the loss."""
    names, settings, losses = scored(runs)
    return coordinates(names, settings, losses, "held-out loss") if len(names) >= 3 else None


def importance(runs: Sequence[Run]) -> Chart | None:
    _, settings, losses = scored(runs)
    return correlations(settings, losses, "held-out loss")


def scored(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[Any]], list[float]]:
    """(names, settings that differ, final losses) of the runs that have one."""
    found = [(run, loss) for run in runs if (loss := final_loss(run)) is not None]
    return [run.name for run, _ in found], differing([run for run, _ in found]), [loss for _, loss in found]


def coordinates(
    names: Sequence[str], settings: dict[str, list[Any]], results: list[float], what: str, *, largest: bool = False
) -> Chart | None:
    """A line for each of `names` from setting to setting to its result; the best one thick. `largest`: more is better."""
    if not settings:
        return None
    scales = {name: scale(values) for name, values in [*settings.items(), (what, results)]}
    best = (max if largest else min)(range(len(names)), key=results.__getitem__)
    data, axis = [], list(scales)
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        heights = [scales[key][0][i] for key in axis]
        trace = line(name, list(range(len(axis))), heights, "first" if i == best else "muted", mode="lines+markers")
        trace["line"]["width"] = 3 if i == best else 1
        data.append(trace | {"meta": name, "hovertemplate": plain(f"{name}: {result:.4g}") + "<extra></extra>"})
    data.append(data.pop(best))  # drawn last, over the others
    labels = [
        {"x": at, "y": y, "text": plain(text), "showarrow": False, "yanchor": anchor, "font": {"size": 11}}
        for at, key in enumerate(axis)
        for y, text, anchor in ((-0.04, scales[key][1], "top"), (1.04, scales[key][2], "bottom"))
    ]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axis))),
            "ticktext": [plain(key).replace(".", ".<br>") for key in axis],
            "side": "top",
            "range": [-0.3, len(axis) - 0.7],
        },
        "yaxis": {"visible": False, "range": [-0.16, 1.16]},
        "annotations": labels,
        "showlegend": False,
        "height": 360,
        "margin": {"l": 20, "r": 20, "t": 40, "b": 20},
    }
    rows = [
        (name, *(values[i] for values in settings.values()), f"{result:.4g}")
        for i, (name, result) in enumerate(zip(names, results, strict=True))
    ]
    end = "highest" if largest else "lowest"
    return Chart(
        id="parallel",
        title=f"Settings and {what}",
        alt=f"{', '.join(settings)} of {len(names)} runs on parallel axes; {names[best]} has the {end} {what}.",
        data=data,
        columns=("run", *settings, what),
        rows=rows,
        layout=layout,
        note=f"Each line is a run, from setting to {what}; the thick one, {names[best]}, ended {end}.",
    )


def correlations(
    settings: dict[str, list[Any]], results: list[float], what: str, *, largest: bool = False
) -> Chart | None:
    """Importance: a bar for each setting that is a number; green where larger values went with better results."""
    if len(results) < FEWEST:
        return None
    found = {
        name: spearman([float(v) for v in values], results)
        for name, values in settings.items()
        if all(isinstance(v, (int, float)) for v in values)
    }
    if not found:
        return None
    order = sorted(found, key=lambda name: abs(found[name]))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [plain(name) for name in order],
            "x": [found[n] for n in order],
            "marker": {"color": ["good" if (found[name] > 0) == largest else "bad" for name in order]},
            "name": "correlation",
        }
    ]
    alt = f"Rank correlation with the {what}: " + ", ".join(f"{n} {found[n]:+.2f}" for n in reversed(order)) + "."
    note = f"Spearman's rank correlation over {len(results)} runs; above zero: larger values went with a higher {what}."
    return Chart(
        id="importance",
        title=f"Which setting went with the {what}",
        alt=alt,
        data=data,
        layout={"xaxis": {"range": [-1, 1], "title": {"text": "rank correlation"}}, "height": 120 + 36 * len(order)},
        columns=("setting", "rank correlation"),
        rows=[(n, f"{found[n]:+.3f}") for n in reversed(order)],
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
