"""The page of a sweep: its table, the best trial, what each trial came to, the metric over each key and over all of them on parallel
axes, which key went with it, the curves of all trials.

Written at the end of a sweep and by `trebuchet report SWEEP`. Left out: how a figure is drawn (page.js), and single trials, which have
pages of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import record, sweep_text
from ..sweep import SweepFolder
from . import collect, compare
from .charts import Chart, axes, line, plain
from .page import as_script, environment, frame


def write(sweep: SweepFolder) -> Path:
    """SWEEP/report.html, atomically. Raises UserError without plotly."""
    output = sweep.root / "report.html"
    found = sweep_text.table(sweep)
    record.write_atomically(output, frame(str(found["sweep"]), body(sweep, found)))
    return output


def body(sweep: SweepFolder, found: dict[str, Any]) -> str:
    runs = [collect.read(trial) for trial in sweep.trials()]
    facts = sweep.facts()
    made = [results(found)]
    made += [over(found, key, facts["space"][key], i) for i, key in enumerate(found["space"])]
    curves = compare.curves([run for run in runs if run.steps or run.evaluations])
    shown = [chart for chart in (*made, *together(found), curves) if chart is not None]
    return (
        environment()
        .get_template("sweep.jinja")
        .render(
            found=found,
            text=sweep_text.status(found).splitlines(),
            charts={chart.id: chart for chart in shown},
            keys=[chart.id for chart in made[1:] if chart is not None],
            figures=as_script([chart.figure() for chart in shown]),
        )
    )


def scored(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with a value, in the order of the trials."""
    return sorted((row for row in found["trials"] if row["value"] is not None), key=lambda row: row["trial"])


def results(found: dict[str, Any]) -> Chart | None:
    """What each trial came to, and the best until then."""
    rows = scored(found)
    if not rows:
        return None
    names, values = [row["trial"] for row in rows], [row["value"] for row in rows]
    pick = min if found["mode"] == "min" else max
    best = [pick(values[: i + 1]) for i in range(len(values))]
    data = [points("trials", names, rows), line("best until then", names, best, "second", mode="lines")]
    layout = axes("trial", plain(found["metric"]), xaxis={"type": "category", "title": {"text": "trial"}})
    alt = f"{found['metric']} of {len(rows)} trials: best {pick(values):.4g}, of trial {names[values.index(pick(values))]}."
    table = [
        (row["trial"], f"{row['value']:.4g}", "ended early" if row["stopped_early"] else row["state"]) for row in rows
    ]
    return Chart(
        id="results",
        title="Trials",
        alt=alt,
        data=data,
        layout=layout,
        columns=("trial", found["metric"], ""),
        rows=table,
    )


def together(found: dict[str, Any]) -> list[Chart | None]:
    """All keys of the space that differ on parallel axes, and how each went with the metric; of trials that came to their end."""
    rows = [row for row in scored(found) if not row["stopped_early"] and set(found["space"]) <= set(row["values"])]
    if len(rows) < 3:
        return []
    values = {key: [row["values"][key] for row in rows] for key in found["space"]}
    settings = {key: column for key, column in values.items() if len(set(map(str, column))) > 1}
    names, results, metric = [row["trial"] for row in rows], [row["value"] for row in rows], found["metric"]
    largest = found["mode"] == "max"
    return [
        compare.coordinates(names, settings, results, metric, largest=largest),
        compare.correlations(settings, results, metric, largest=largest),
    ]


def over(found: dict[str, Any], key: str, values: dict[str, Any], number: int) -> Chart | None:
    """The metric over one key of the space; by logarithm where the key was drawn so or spans more than a factor of 20."""
    rows = [row for row in scored(found) if key in row["values"]]
    if len({str(row["values"][key]) for row in rows}) < 2:
        return None
    x = [row["values"][key] for row in rows]
    numeric = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in x)
    wide = numeric and 0 < min(x) < max(x) / 20
    kind = "log" if values.get("log_uniform") or wide else "linear" if numeric else "category"
    data = [points(key, x if numeric else [plain(str(one)) for one in x], rows)]
    layout = axes(plain(key), plain(found["metric"]), showlegend=False)
    layout["xaxis"]["type"] = kind
    table = [(row["values"][key], f"{row['value']:.4g}", row["trial"]) for row in rows]
    alt = f"{found['metric']} of {len(rows)} trials over {key}."
    return Chart(
        id=f"key-{number}",
        title=key,
        alt=alt,
        data=data,
        layout=layout,
        columns=(key, found["metric"], "trial"),
        rows=table,
    )


def points(name: str, x: Sequence[Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Markers, hollow for trials that were ended early: their value is not of a whole trial."""
    symbols = ["circle-open" if row["stopped_early"] else "circle" for row in rows]
    trace = line(name, x, [row["value"] for row in rows], "first", mode="markers")
    hover = [plain(f"trial {row['trial']}") for row in rows]
    return trace | {"marker": {"color": "first", "size": 9, "symbol": symbols}, "text": hover}
