"""From the data section of a configuration to memory-mapped token sets, with a report, in one call.

Sources are tokenized one by one, each into a cache entry of its own (`intake.py`); split, weights, length and packing
are arithmetic on top. So every rank may call `prepare`: one does the work, the others wait and map the same files.
Left out: torch, the model, and the order of rows (`order.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...launcher.schema import Data, Objective
from . import preflight, selection
from .intake import Intake, code_version, digest
from .packing import Rows, pack
from .rendering import find_template
from .report import DataReport, SetReport, describe
from .store import Store
from .tokens import TokenSet


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`train_rows` and `eval_rows` are the packed rows, sample indices into `train` and `eval`. `chat_template` is
    the text of the template that was used, for the tokenizer that is saved with the model; None when no sample needed
    one."""

    train: TokenSet
    eval: TokenSet | None
    train_rows: Rows
    eval_rows: Rows
    report: DataReport
    chat_template: str | None
    fingerprint: str


def prepare(
    data: Data,
    objective: Objective,
    *,
    tokenizer: Any,
    tokenizer_id: str,
    model_max_length: int | None,
    cache_dir: Path,
    seed: int,
) -> Prepared:
    """Reads, recognises, renders, tokenizes, masks and checks; a second call with the same content maps the cache.

    `tokenizer` is a fast transformers tokenizer, `tokenizer_id` its name in messages. `model_max_length` is the
    model's number of positions, None when it has no limit. Raises DataError for anything in the data, the template or
    the configuration that would train something else than was asked for, and raises it again on the second call.
    """
    preflight.check_positions(data.max_length, model_max_length, tokenizer_id)
    pretrain = objective.name == "pretrain"
    intake = Intake(
        tokenizer=tokenizer,
        tokenizer_id=tokenizer_id,
        renderer=None if pretrain else find_template(data.chat_template, tokenizer, tokenizer_id),
        train_on="all" if pretrain else data.train_on,
        pretrain=pretrain,
        cache=Path(cache_dir),
    )
    stores = [intake.store(source, "train") for source in data.train]
    own_eval = [] if isinstance(data.eval, float) else [intake.store(source, "eval") for source in data.eval]
    train, held, leaked, shared = _select(data, stores, own_eval, seed)

    finish = partial(_finish, data=data, pretrain=pretrain, model_max_length=model_max_length, seed=seed)
    train, train_rows, train_report = finish(train, "the training data")
    held, eval_rows, eval_report = finish(held, "the held-out data") if held else (None, (), None)
    fingerprint = digest(
        code_version(),
        [store.key for store in stores],
        [source.weight for source in data.train],
        data.eval if isinstance(data.eval, float) else [store.key for store in own_eval],
        (data.max_length, data.packing, seed),
    )
    report = DataReport(
        sources=tuple(intake.reports),
        template=intake.template.origin if intake.template else None,
        max_length=data.max_length,
        packing=data.packing,
        train_on=intake.train_on,
        train=train_report,
        eval=eval_report,
        leaked=leaked,
        shared_prompts=shared,
        notes=tuple(_notes(train_report, eval_report, leaked, shared)),
        fingerprint=fingerprint,
        cached=intake.cached,
    )
    return Prepared(
        train=train,
        eval=held,
        train_rows=train_rows,
        eval_rows=eval_rows,
        report=report,
        chat_template=intake.template.template if intake.template else None,
        fingerprint=fingerprint,
    )


def _select(
    data: Data, stores: list[Store], own_eval: list[Store], seed: int
) -> tuple[TokenSet, TokenSet | None, int, int]:
    """(train, eval, samples removed from train as they stand in eval, samples that share only their prompt with it)."""
    train, leaked, shared = selection.whole(stores), 0, 0
    held: TokenSet | None = None
    if own_eval:
        held = selection.whole(own_eval)
        train, leaked, shared = selection.remove_leaks(train, held)
        preflight.check_empty(len(train), "the training data", f": all {leaked:,} samples stand in data.eval too")
    elif isinstance(data.eval, float) and data.eval > 0:
        train, held = selection.hold_out(train, data.eval, seed)
    train = selection.weigh(train, [source.weight for source in data.train], seed)
    preflight.check_empty(len(train), "the training data", ": the weights leave no sample")
    return train, held, leaked, shared


def _finish(
    samples: TokenSet, what: str, *, data: Data, pretrain: bool, model_max_length: int | None, seed: int
) -> tuple[TokenSet, Rows, SetReport]:
    """One set cut at max_length, checked for what only lengths can tell, packed and described."""
    duplicates = len(samples) - len(np.unique(selection.field(samples, "whole")))
    truncated = lost = split = 0
    if pretrain:
        samples, split = selection.split_documents(samples, data.max_length)
    else:
        preflight.check_truncation(
            samples.lengths,
            what=what,
            max_length=data.max_length,
            limit=data.max_truncated,
            model_max_length=model_max_length,
        )
        samples, truncated, lost = selection.cut(samples, data.max_length)
        preflight.check_empty(
            len(samples), what, f": the prompts alone fill data.max_length {data.max_length} in all {lost:,} samples"
        )
    rows = pack(samples.lengths, data.max_length, seed, packing=data.packing)
    counts = {"truncated": truncated, "lost": lost, "split": split, "duplicates": duplicates}
    return samples, rows, describe(samples, rows, max_length=data.max_length, **counts)


def _notes(train: SetReport, held: SetReport | None, leaked: int, shared: int) -> Iterator[str]:
    if leaked:
        yield f"{leaked:,} training samples stand in the held-out data too and were removed"
    if shared:
        yield f"{shared:,} training samples share their prompt with a held-out one but have another answer; they stay"
    if train.duplicates:
        yield f"{train.duplicates:,} training samples are exact repeats"
    if held and held.samples < 20:
        yield f"only {held.samples} held-out samples: the evaluation loss will be noisy"
