"""What an answer is worth: exact match, ROUGE, code that compiles, JSON that validates, or a function of the user's.

Each metric is a function (answer, reference) -> a number from 0 to 1, larger is better. A user's function is named
`path/to/file.py:function`; it is the user's own code, run in the process that evaluates. Left out: asking the model (`evaluate.py`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from runpy import run_path

from ..launcher.errors import UserError, did_you_mean

Metric = Callable[[str, str], float]
FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", re.DOTALL)


def exact_match(answer: str, reference: str) -> float:
    """Equal after runs of blanks are made one."""
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def rouge(answer: str, reference: str) -> float:
    """F1 of ROUGE-L (Lin 2004) by the rouge-score package, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("the metric rouge needs a package: `pip install 'trebuchet[eval]'`.") from None
    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


def compiles(answer: str, reference: str) -> float:
    """The first fenced block, or else the whole answer, parses as Python. It is not run."""
    try:
        ast.parse(inside(answer))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return float(bool(inside(answer).strip()))


def valid_json(answer: str, reference: str) -> float:
    """Parses as JSON; where the reference is a JSON object, it has the reference's keys too."""
    try:
        found = json.loads(inside(answer))
    except (ValueError, RecursionError):
        return 0.0
    try:
        wanted = json.loads(inside(reference))
    except (ValueError, RecursionError):
        return 1.0
    return float(not isinstance(wanted, dict) or (isinstance(found, dict) and wanted.keys() <= found.keys()))


def inside(text: str) -> str:
    block = FENCE.search(text)
    return block[1] if block else text


METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge": rouge, "compiles": compiles, "json": valid_json}


def find(name: str) -> Metric:
    """Raises UserError for a name that is neither a metric nor `FILE.py:FUNCTION`."""
    if name in METRICS:
        return METRICS[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(
            f"evaluation.metrics: unknown metric '{name}'{did_you_mean(name, METRICS)} or FILE.py:FUNCTION."
        )
    path = Path(file).expanduser()
    if not path.exists():
        raise UserError(f"evaluation.metrics: {file} does not exist.")
    found = run_path(str(path)).get(function)
    if not callable(found):
        raise UserError(f"evaluation.metrics: {file} has no function {function}.")
    return found


def values(name: str, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """One number per answer. Raises UserError when a user's function fails or gives something else than 0 to 1."""
    metric, out = find(name), []
    for answer, reference in zip(answers, references, strict=True):
        try:
            value = float(metric(answer, reference))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"evaluation.metrics: {name} failed: {type(error).__name__}: {error}") from error
        if not 0 <= value <= 1:
            raise UserError(f"evaluation.metrics: {name} gave {value}; a metric gives a number from 0 to 1.")
        out.append(value)
    return out
