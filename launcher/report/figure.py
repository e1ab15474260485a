"""One figure of a page, as plotly's own JSON: an id, a title, a sentence for those who cannot see it, and its table.

Colours are names that page.js turns into those of the light or dark page. Left out: what the figures show (`charts.py`,
`charts_memory.py`, `compare.py`), and plotly itself, which draws in the browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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


def columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """(x, y) of points, as `line` takes them."""
    return [x for x, _ in points], [y for _, y in points]


def plain(text: str) -> str:
    """Plotly takes some tags in names and labels; a user's words are not tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **more}


def sampled(steps: Sequence[dict[str, Any]], most: int = 25) -> list[dict[str, Any]]:
    """Rows for a table that a person reads."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
