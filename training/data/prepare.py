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

from ...launcher.errors import ConfigError, DataError
from ...launcher.schema import Data, Objective
from . import preflight, selection
from . import units as units_of
from .curate import Maker, curate, training_sources
from .intake import Intake, code_version, digest
from .mixture import Mixture, mix
from .packing import Rows, pack
from .rendering import find_template
from .report import DataReport, SetReport, describe
from .tokens import TokenSet
from .units import Units


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`train_rows` and `eval_rows` are the packed rows, sample indices into `train` and `eval`. `chat_template` is
    the text of the template that was used, for the tokenizer that is saved with the model; None when no sample needed
    one."""

    train: Units
    eval: Units | None
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
    kind, cache_dir = kind_of(objective), Path(cache_dir)
    intake = _intake(data, objective, tokenizer, tokenizer_id, cache_dir)
    decision = None
    if data.curate:
        decision = curate(data, kind=kind, roles=intake.roles, seed=seed, cache=cache_dir)
    stores = [intake.store(source, "train") for source in data.train]
    stores += [intake.store(source, "general") for source in (data.general.sources if data.general else ())]
    own_eval = [] if isinstance(data.eval, float) else [intake.store(source, "eval") for source in data.eval]
    mixed = mix(data, stores, own_eval, decision, seed)

    finish = partial(_finish, data=data, objective=objective, model_max_length=model_max_length, seed=seed)
    units, train_rows, train_report = finish(mixed.train, "the training data")
    held_units, eval_rows, eval_report = finish(mixed.held, "the held-out data") if mixed.held else (None, (), None)
    fingerprint = digest(
        code_version(),
        [store.key for store in stores],
        mixed.weights,
        decision.report.fingerprint if decision else None,
        data.eval if isinstance(data.eval, float) else [store.key for store in own_eval],
        (data.max_length, data.packing, seed, kind),
    )
    report = DataReport(
        sources=tuple(intake.reports),
        template=intake.template.origin if intake.template else None,
        max_length=data.max_length,
        packing=data.packing,
        train_on=intake.train_on,
        train=train_report,
        eval=eval_report,
        leaked=mixed.leaked,
        shared_prompts=mixed.shared,
        notes=tuple([*_notes(train_report, eval_report, mixed), *_label_notes(units, objective)]),
        fingerprint=fingerprint,
        cached=intake.cached and (decision is None or decision.cached),
        curation=decision.report if decision else None,
    )
    return Prepared(
        train=units,
        eval=held_units,
        train_rows=train_rows,
        eval_rows=eval_rows,
        report=report,
        chat_template=intake.template.template if intake.template else None,
        fingerprint=fingerprint,
    )


def prepare_part(
    data: Data, objective: Objective, *, tokenizer: Any, tokenizer_id: str, cache_dir: Path, shards: int, shard: int
) -> int:
    """One of `shards` parts of the work of `prepare`, on any machine that sees the cache; how many blocks it made. When all
    are done `prepare` puts them together, to the same bytes that it makes alone."""
    cache_dir = Path(cache_dir)
    intake = _intake(data, objective, tokenizer, tokenizer_id, cache_dir)
    own_eval = () if isinstance(data.eval, float) else data.eval
    sources = [*training_sources(data), *own_eval]
    made = 0
    for k, source in enumerate(sources):

        def wanted(block: int, k: int = k) -> bool:
            return (block + k) % shards == shard

        made += intake.part(source, wanted)
        if data.curate:
            maker = Maker(data.curate, skip_bad_rows=data.skip_bad_rows, cache=cache_dir)
            samples = intake.samples(source)
            content = samples.table.digest(cache_dir / "files")
            made += maker.part(samples, content, wanted, filtered=k < len(sources) - len(own_eval))
    return made


def _intake(data: Data, objective: Objective, tokenizer: Any, tokenizer_id: str, cache: Path) -> Intake:
    kind = kind_of(objective)
    pretrain = kind == "pretrain"
    if kind in ("preference", "kto") and data.train_on != "assistant":
        raise ConfigError([f"data.train_on: objective {objective.name} compares the assistant's answers; leave it out"])
    return Intake(
        tokenizer=tokenizer,
        tokenizer_id=tokenizer_id,
        renderer=None if pretrain else find_template(data.chat_template, tokenizer, tokenizer_id),
        train_on="all" if pretrain else data.train_on,
        kind=kind,
        cache=cache,
        skip_bad_rows=data.skip_bad_rows,
    )


def kind_of(objective: Objective) -> str:
    """Of the rows that an objective reads: sft, pretrain, preference or kto."""
    return "preference" if objective.pairs else objective.name


def row_tokens(data: Data, objective: Objective) -> int:
    """Tokens that a packed row has room for. A pair counts as two rows, and stands in one."""
    return data.max_length * (2 if objective.pairs else 1)


def _finish(
    samples: TokenSet, what: str, *, data: Data, objective: Objective, model_max_length: int | None, seed: int
) -> tuple[Units, Rows, SetReport]:
    """One set cut at max_length, checked for what only lengths can tell, packed and described."""
    duplicates = len(samples) - len(np.unique(selection.field(samples, "whole")))
    truncated = lost = split = 0
    units: Units = units_of.pairs(samples) if objective.pairs else samples
    if objective.name == "pretrain":
        units, split = selection.split_documents(samples, data.max_length)
    else:
        preflight.check_truncation(
            units.document_lengths,
            what=what,
            max_length=data.max_length,
            limit=data.max_truncated,
            model_max_length=model_max_length,
        )
        units, truncated, lost = _cut(units, what, data, objective)
        preflight.check_empty(
            len(units), what, f": the prompts alone fill data.max_length {data.max_length} in all {lost:,} samples"
        )
    room = row_tokens(data, objective)
    rows = pack(units.lengths, room, seed, packing=data.packing)
    counts = {"truncated": truncated, "lost": lost, "split": split, "duplicates": duplicates}
    if objective.name == "reward":
        counts |= {"lost": 0, "too_long": lost}
    return units, rows, describe(units, rows, max_length=room, **counts)


def _cut(units: Units, what: str, data: Data, objective: Objective) -> tuple[Units, int, int]:
    """(units, how many were cut, how many dropped). A score is read at the end of an answer, so reward drops what it would
    have to cut, as TRL does."""
    if isinstance(units, units_of.PairSet):
        return units_of.cut_pairs(units, data.max_length, drop=objective.name == "reward")
    assert isinstance(units, TokenSet)
    if objective.name == "kto":
        return units_of.judged(units, data.max_length, what)
    return selection.cut(units, data.max_length)


def _label_notes(units: Units, objective: Objective) -> Iterator[str]:
    """KTO's authors advise weights that bring desirable to undesirable between 1:1 and 4:3 (Ethayarajh et al. 2024, eq. 8)."""
    if not isinstance(units, units_of.JudgedSet):
        return
    good, bad = units_of.label_counts(units.labels)
    if not good or not bad:
        raise DataError(
            f"the training data: all {len(units):,} rows have label {'true' if good else 'false'}, and kto learns from "
            f"both. Bring rows of the other kind, or use objective: {'sft' if good else 'dpo, with pairs'}."
        )
    ratio = good * objective.desirable_weight / max(bad * objective.undesirable_weight, 1e-9)
    yield f"{good:,} rows with label true, {bad:,} with label false"
    if not 0.75 <= ratio <= 4 / 3 + 1e-9:
        name, value = ("desirable_weight", bad / good) if good < bad else ("undesirable_weight", good / bad)
        yield f"the weights of both labels are {ratio:.2g} to 1; objective.{name}: {value:.3g} would make them even"


def _notes(train: SetReport, held: SetReport | None, mixed: Mixture) -> Iterator[str]:
    if mixed.general:
        yield f"general data: {mixed.general:,} of {len(mixed.train):,} training samples, {mixed.general / len(mixed.train):.1%}"
    if mixed.leaked:
        yield f"{mixed.leaked:,} training samples stand in the held-out data too and were removed"
    if mixed.shared:
        yield f"{mixed.shared:,} training samples share their prompt with a held-out one but have another answer; they stay"
    if train.duplicates:
        yield f"{train.duplicates:,} training samples are exact repeats"
    if held and held.samples < 20:
        yield f"only {held.samples} held-out samples: the evaluation loss will be noisy"
