"""A report as text: one HTML file, everything inlined, every word of a user escaped.

Jinja escapes whatever goes into the page; figures go in as JSON in which no tag can begin. A content policy in the page forbids
loading anything from anywhere. Left out: what the figures show (`charts.py`, `compare.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from .. import record
from ..errors import UserError
from . import charts, compare
from .collect import Run

HERE = Path(__file__).parent
SAMPLES = 20


def write(runs: Sequence[Run], output: Path) -> Path:
    """Atomically; a report of a running run may be written again and again."""
    record.write_atomically(output, render(runs))
    return output


def render(runs: Sequence[Run]) -> str:
    """The whole page of a file."""
    return frame(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", body(runs))


def frame(title: str, body: str, live: str | None = None) -> str:
    """The page around a body; `live`: where the page asks for the body again."""
    parts = {"style": text("page.css"), "script": text("page.js"), "plotly": plotly()}
    return environment().get_template("page.jinja").render(title=title, body=body, live=live, **parts)


def index(runs: Mapping[str, Run], most_curves: int) -> str:
    """The body of the list of runs by the names of their pages, with the curves of the first `most_curves`."""
    made = [chart for chart in [compare.curves(list(runs.values())[:most_curves])] if chart is not None]
    figures = as_script([chart.figure() for chart in made])
    found = {
        "runs": runs,
        "charts": {chart.id: chart for chart in made},
        "figures": figures,
        "final_loss": compare.final_loss,
    }
    return environment().get_template("index.jinja").render(**found)


def body(runs: Sequence[Run]) -> str:
    """What changes while a run trains: everything inside <main>, figures included."""
    made = charts.of_run(runs[0]) if len(runs) == 1 else compare.of_runs(runs)
    figures = as_script([chart.figure() for chart in made])
    found = {
        "runs": runs,
        "charts": {chart.id: chart for chart in made},
        "figures": figures,
        "final_loss": compare.final_loss,
    }
    if len(runs) == 1:
        return (
            environment()
            .get_template("run.jinja")
            .render(run=runs[0], facts=facts(runs[0]), samples=samples(runs[0]), **found)
        )
    return environment().get_template("runs.jinja").render(settings=compare.differing(runs), **found)


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the tiles at the top."""
    evaluation = run.record.get("evaluation") or {}
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    out = [("state", run.record["state"], run.record.get("error") or "")]
    if evaluation.get("verdict"):
        out.append(("verdict", evaluation["verdict"], "held-out rows, base against tuned, 95% interval"))
    if "loss" in after:
        change = f"from {before['loss']:.3f}" if before else ""
        out.append(("held-out loss", f"{after['loss']:.3f}", change))
    kl = (evaluation.get("forgetting") or {}).get("kl_nats")
    if kl is not None:
        limit = evaluation["forgetting"].get("limit")
        out.append(
            (
                "away from the base",
                f"{kl:.2f} nats",
                f"at most {limit:g} allowed" if limit else "per token, on general prompts",
            )
        )
    steps = run.record.get("steps")
    out.append(
        (
            "steps",
            f"{run.record['step']:,}" + (f" of {steps:,}" if steps else ""),
            run.record.get("stopped_early") or "",
        )
    )
    planned = (run.chosen.get("time") or {}).get("hours")
    out.append(
        ("time", duration(run.seconds), f"{duration(planned * 3600)} planned" if planned else "nothing was planned")
    )
    if run.cost is not None:
        budget = run.chosen.get("cost")
        out.append(
            (
                "cost",
                f"{run.cost:.2f}",
                f"{budget:.2f} planned" if budget is not None else f"{run.gpu_hours:.2f} GPU hours",
            )
        )
    elif run.chosen.get("gpus"):
        out.append(("GPU hours", f"{run.gpu_hours:.2f}", "the cluster file has no price"))
    return out


def samples(run: Run) -> list[dict[str, Any]]:
    return list(run.figures.get("samples") or [])[:SAMPLES]


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def short(value: Any) -> Any:
    """A number of a setting in four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else value


def minute(moment: str) -> str:
    """`2026-11-25 07:26 +0000` of a record's time."""
    return f"{moment[:10]} {moment[11:16]} {moment[19:]}".strip()


def as_script(value: Any) -> str:
    """JSON that is safe inside <script>: no tag, no comment and no entity can begin in it."""
    plain = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    return (
        plain.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["duration"] = duration
    made.filters |= {"zip": zip, "short": short, "minute": minute}
    return made


def text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """The library of the `report` extra, as one script. Raises UserError when it is not installed."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        raise UserError("reports need plotly: `pip install 'trebuchet[report]'`.")
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
