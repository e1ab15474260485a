"""`trebuchet eval`: runs and their checkpoints asked again, here one after the other, or on a cluster as one array job.

What is asked, and of what, is training/again.py's. A row for each goes into one table, evaluations.jsonl beside the first run. Importing
this loads no torch, so that a login node without it can hand the work in.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import backends, record
from .cluster import load_cluster
from .errors import RunError, TrebuchetError
from .run_folder import RunFolder
from .run_text import FIGURES, comparison
from .sweep import open_sweep

FORMS = {"loss": "{:.4f}", **FIGURES}  # of the table, where the objective has them
Asked = dict[str, Any]


def add_eval(verb: Any) -> None:
    text = "base against the finished model on the held-out rows, with a verdict; of several runs one table"
    sub = verb("eval", run, text, json=True, cluster=True)
    sub.add_argument("runs", metavar="RUN", nargs="+", help="of a sweep: all trials that have a model")
    metrics = "exact_match,rouge,compiles,json or FILE.py:FUNCTION"
    sub.add_argument("--metrics", default="", metavar="NAMES", help=metrics)
    answers = "answers side by side; default: as in the run"
    sub.add_argument("--generations", type=int, default=0, metavar="N", help=answers)
    sub.add_argument("--harness", default="", metavar="TASKS", help="tasks of lm-evaluation-harness, by name")
    sub.add_argument("--checkpoints", action="store_true", help="every checkpoint that a run keeps, too")
    sub.add_argument("--output", metavar="FILE", help="the table; default: evaluations.jsonl beside the first run")


def run(options: argparse.Namespace) -> int:
    from .cli import print_json

    what = [tuple(filter(None, text.split(","))) for text in (options.metrics, options.harness)]
    asked = {"metrics": what[0], "tasks": what[1], "generations": options.generations}
    subjects = find(options.runs, checkpoints=options.checkpoints)
    if len(subjects) == 1 and not options.cluster and not options.output and subjects[0][1] is None:
        figures = evaluate(subjects[0], asked)
        if options.json:
            print_json({key: value for key, value in figures.items() if key not in ("before", "after")})
        else:
            print("\n".join(comparison(figures)))
        return 0
    rows = on_cluster(subjects, asked, options.cluster) if options.cluster else here(subjects, asked)
    beside = Path(subjects[0][0]).parent / "evaluations.jsonl"
    file = Path(options.output).expanduser().absolute() if options.output else beside
    record.write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if options.json:
        print_json(rows)
    else:
        print("\n".join([*table(rows), f"table   {file}"]))
    return int(any(row["error"] for row in rows))


Subject = tuple[str, int | None]  # a run's folder, and the step of a checkpoint; None for its model


def find(runs: Sequence[str], *, checkpoints: bool) -> list[Subject]:
    """Each once, in order. Raises RunError for a run without a model."""
    folders: list[RunFolder] = []
    for name in runs:
        if several := open_sweep(name):
            with_model = [trial for trial in several.trials() if trial.model.is_dir()]
            if not with_model:
                raise RunError(f"no trial of {name} has a model yet; a trial writes it when it has ended.")
            folders += with_model
        else:
            folders.append(record.with_model(name))
    found: list[Subject] = []
    for folder in folders:
        steps = folder.checkpoints.glob("step-*/manifest.json") if checkpoints else ()
        found += [(str(folder.root), n) for n in sorted(int(p.parent.name.removeprefix("step-")) for p in steps)]
        found.append((str(folder.root), None))
    return list(dict.fromkeys(found))


def evaluate(subject: Subject, asked: Asked) -> dict[str, Any]:
    """In this process: what training/again.py finds."""
    from .after import quiet

    quiet()
    from ..training.again import evaluate as ask
    from ..training.finished import open_finished

    return ask(open_finished(subject[0]), **asked, checkpoint=subject[1])


def row(subjects: Sequence[Subject], asked: Asked, number: int) -> dict[str, Any]:
    """One row of the table; runs here or in a job, so everything in it is JSON."""
    figures = evaluate(subjects[number], asked)
    numbers = {when: {k: figures[when][k] for k in FORMS if k in figures[when]} for when in ("before", "after")}
    return numbers | {key: figures.get(key) for key in ("verdict", "verdicts", "compared", "harness")}


def here(subjects: Sequence[Subject], asked: Asked) -> list[dict[str, Any]]:
    """One after the other; one that cannot be asked is a row with its reason and stops no other."""
    rows = []
    for number, subject in enumerate(subjects):
        print(f"{label(subject)} ({number + 1} of {len(subjects)})", file=sys.stderr, flush=True)
        try:
            found: dict[str, Any] = {"result": row(subjects, asked, number), "error": None}
        except TrebuchetError as problem:
            found = {"result": None, "error": str(problem)}
        except Exception as problem:  # of the libraries that open a model: a file that is missing or damaged
            found = {"result": None, "error": f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"}
        rows.append(found)
    return [in_table(subject, found) for subject, found in zip(subjects, rows, strict=True)]


def on_cluster(subjects: Sequence[Subject], asked: Asked, cluster: str) -> list[dict[str, Any]]:
    """One job for each, all handed in with one call and waited for. Ctrl+C takes them back."""
    where = load_cluster(cluster)
    module = backends.parts(where.scheduler)
    folder = Path(subjects[0][0]).parent / ".evaluations" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    each: Callable[[int], Any] = functools.partial(row, list(subjects), asked)
    gpus = int(where.groups[0].gpus_per_node > 0)
    handle, wait = module.parts(each, len(subjects), where, folder=folder, name="eval", gpus=gpus)
    print(f"{len(subjects)} evaluations are {handle}; waiting for them. Their logs: {folder}", file=sys.stderr)
    return [in_table(subject, found) for subject, found in zip(subjects, wait(), strict=True)]


def in_table(subject: Subject, found: dict[str, Any]) -> dict[str, Any]:
    folder, step = subject
    nothing = dict.fromkeys(("before", "after", "verdict", "verdicts", "compared", "harness"))
    return {"run": folder, "checkpoint": step, **(found["result"] or nothing), "error": found["error"]}


def label(subject: Subject) -> str:
    folder, step = subject
    return Path(folder).name + ("" if step is None else f" step {step}")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """As text: each run with its figures after training, and those of the base where they differ in one line each."""
    names = [name for name in FORMS if any(name in (row["after"] or {}) for row in rows)]
    cells = [["RUN", *(f"{word}{name.upper()}" for name in names for word in ("BASE ", "")), "VERDICT"]]
    for one in rows:
        figures = []
        for name in names:
            for when in ("before", "after"):
                value = (one[when] or {}).get(name)
                figures.append("-" if value is None else FORMS[name].format(value))
        cells.append([label((one["run"], one["checkpoint"])), *figures, one["error"] or one["verdict"] or "-"])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)] + [0]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
