"""A run that has a model: its plan, base, tokenizer and data, opened as the run itself opened them. Starts and writes nothing.

Left out: the weights. Who needs them reads them by `streamed.py` or loads them by `load_pair` of evaluation.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..launcher import record
from ..launcher.errors import RunError
from ..launcher.plan import Chosen, Plan
from ..launcher.run_folder import RunFolder
from . import load

if TYPE_CHECKING:
    from .data import Prepared


@dataclass(frozen=True)
class Finished:
    folder: RunFolder
    plan: Plan

    @property
    def chosen(self) -> Chosen:
        assert self.plan.chosen is not None
        return self.plan.chosen

    @cached_property
    def record(self) -> dict[str, Any]:
        return record.read(self.folder)

    @cached_property
    def base(self) -> Path:
        return load.model_folder(self.plan.config.model, self.plan.model)

    @cached_property
    def tokenizer(self) -> Any:
        """As it was saved with the model, with the template of training."""
        return load.load_tokenizer(self.folder.model, self.plan.config.model)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)

    @cached_property
    def data(self) -> Prepared:
        """The run's rows; from the cache, or read and tokenized again. Raises DataError when they are gone or changed."""
        found = load.prepared_data(
            self.plan.config, self.plan.model, load.load_tokenizer(self.base, self.plan.config.model)
        )
        recorded = self.record.get("data") or {}
        now = found.report.to_dict()
        # The fingerprint takes in the version of the code that tokenizes; after an update the counts must still be the same.
        if recorded and now["fingerprint"] != recorded["fingerprint"]:
            same = all(_counts(now[part]) == _counts(recorded[part]) for part in ("train", "eval"))
            if not same:
                raise RunError(
                    f"the data of {self.folder.root} have changed since it was trained: other counts than in run.json. Put the files "
                    f"of {self.plan.config.data.train[0].path} back as they were."
                )
        return found

    def prompts(self, count: int) -> list[list[int]]:
        """Token ids of `count` samples spread over the held-out rows; over the training rows where none are held out."""
        samples = self.data.eval if self.data.eval is not None and len(self.data.eval) else self.data.train
        count = min(count, len(samples))
        picked = [(2 * i + 1) * len(samples) // (2 * count) for i in range(count)]
        return [list(map(int, samples.documents(i)[0][0])) for i in picked]

    def copy_beside(self, folder: Path) -> None:
        """Tokenizer with its template, generation settings and the base's licence into a model folder."""
        self.tokenizer.save_pretrained(folder)
        for pattern in ("generation_config.json", "LICENSE*"):
            for file in sorted(self.base.glob(pattern)):
                shutil.copy(file, folder / file.name)


def _counts(part: dict[str, Any] | None) -> tuple[Any, ...]:
    return tuple((part or {}).get(key) for key in ("samples", "tokens", "trained_tokens", "truncated"))


def open_finished(run: str) -> Finished:
    """By folder or name. Raises RunError when the run has written no model."""
    folder = record.with_model(run)
    return Finished(folder, Plan.model_validate_json(folder.plan.read_text(encoding="utf-8")))
