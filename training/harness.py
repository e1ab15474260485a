"""Tasks of lm-evaluation-harness on a saved model: one of its names, or a YAML file of the user's in the harness's own format.

Found before anything is evaluated, so that a name that does not exist costs nothing. Left out: few-shot settings, limits and
groups of its command line, which belong into a task's YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..launcher.errors import UserError, did_you_mean
from .scores import Subject

DRAWS = 1000  # of the bootstrap by which the harness estimates the error of some metrics


@dataclass(frozen=True)
class Tasks:
    manager: Any  # lm_eval's TaskManager
    names: list[str]


def find(tasks: Sequence[str]) -> Tasks:
    """Raises UserError without the package, the file or the task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--harness needs a package: `pip install 'trebuchet[harness]'`.") from None
    files = [Path(task).expanduser().absolute() for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"--harness: {file} does not exist.")
    named = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    folders = sorted({str(file.parent) for file in files})
    manager = TaskManager(include_path=folders or None, include_defaults=bool(named))
    names = named + [name_in(file) for file in files]
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UserError(f"--harness: lm-evaluation-harness has no task '{name}'{did_you_mean(name, known)}")
    return Tasks(manager, names)


def name_in(file: Path) -> str:
    """The name that a task's YAML gives itself; it may hold the harness's own tags, so it is not parsed as plain YAML."""
    found = re.search(r"^task:\s*['\"]?([^'\"\s#]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise UserError(f"--harness: {file} names no task; a line `task: NAME` belongs in it.")
    return found[1]


def run(tasks: Tasks, subject: Subject, tokenizer: Any, micro_batch: int) -> dict[str, float]:
    """`task/metric,filter` -> value, with the harness's own seeds; errors of the mean are among them as `…_stderr`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=subject.inside, tokenizer=tokenizer, batch_size=micro_batch)
    found = simple_evaluate(model=model, tasks=tasks.names, task_manager=tasks.manager, bootstrap_iters=DRAWS)
    assert found is not None  # None only on ranks other than the first
    return {
        f"{task}/{name}": float(value)
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }
