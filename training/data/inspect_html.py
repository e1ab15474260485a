"""The same as `inspect.terminal` as one HTML page: no script, nothing loaded from anywhere, everything from the data escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from .inspect import Look, Shown, facts, visible
from .report import DataReport, SetReport

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #2a83; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
section { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; padding: .6rem .9rem; }
.unit { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.side h3 { font-size: .95rem; margin: 0 0 .3rem; } .side small { opacity: .7; font-weight: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
table { border-collapse: collapse; } td { padding: .1rem .8rem .1rem 0; vertical-align: top; }
.bar { background: #2a8a; height: .8rem; display: inline-block; vertical-align: middle; min-width: 1px; }
"""


def page(seen: Look, title: str) -> str:
    """A whole document."""
    parts = [*_samples(seen), *_counts(seen.report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n<p><mark>Marked</mark> tokens carry loss.</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _samples(seen: Look) -> Iterator[str]:
    for number, documents in seen.units:
        sides = "".join(map(_side, documents))
        yield f'<section id="unit-{number + 1}"><div class="unit">{sides}</div></section>'


def _side(document: Shown) -> str:
    text = "".join(
        f"<mark>{escape(visible(p.text))}</mark>" if p.trained else escape(visible(p.text)) for p in document.pieces
    )
    share = f"{document.trained:,} of {document.tokens:,} tokens trained"
    return f'<div class="side"><h3>{escape(document.title)} <small>{share}</small></h3><pre>{text}</pre></div>'


def _counts(report: DataReport) -> Iterator[str]:
    yield "<h2>Counts</h2>"
    yield f"<p>Template: {escape(report.template or 'none')}</p>"
    rows = (
        (s.path, s.used_for, f"{s.rows:,} rows", s.layout, ", ".join(f"{n:,} by {how}" for how, n in s.spans.items()))
        for s in report.sources
    )
    yield _table(rows)
    for name, part in (("Training set", report.train), ("Held-out set", report.eval)):
        if part is not None:
            yield f"<h2>{name}</h2>" + _table(facts(part, report.packing).items()) + _histogram(part)
    if report.notes:
        yield "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in report.notes) + "</ul>"


def _histogram(part: SetReport) -> str:
    most = max(count for _, count in part.histogram)
    bars = (
        f'<tr><td>up to {limit:,} tokens</td><td><span class="bar" style="width:{20 * count / most:.2f}rem"></span> {count:,}</td></tr>'
        for limit, count in part.histogram
    )
    return "<table>" + "".join(bars) + "</table>"


def _table(rows: Iterable[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
