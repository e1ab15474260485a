"""The steps of curation, in order, each counted.

    filters      of each row by itself, while the sheets are made (`filters.py`, `rules.py`)
    exact        equal text, white space aside
    near         similar to an earlier row that stays
    reward       scores of a reward model
    balance      a cap on the rows of each value of a column
    hold-out     a share of the rows, by groups of similar ones; or the rows of data.eval, whose likes leave the training set
    leaks        rows that hold much of a held-out row

Left out: how the result is kept (`decide.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ....launcher.errors import DataError
from ....launcher.schema_curate import Curate
from .. import entries
from ..curation_report import Step
from ..samples import Samples
from ..selection import drawn, mix
from . import duplicates, reward
from .leaks import HeldOut
from .sheet import Sheet
from .texts import Texts

_FILTERS = ("min_words", "max_words", "max_repetition", "damaged", "refusals", "languages", "rules", "function")
Gone = dict[int, tuple[str, int | None, float | None]]  # row -> (why, the row it is like, similarity or score)


class Run:
    """The rows of all sheets as one list of places; `gone` says by which step a row left, and what it is like."""

    def __init__(
        self,
        curate: Curate,
        sheets: Sequence[Sheet],
        opened: Sequence[Samples],
        training: int,
        general: int,
        seed: int,
        scorer: reward.Scorer | None,
    ):
        self.curate, self.sheets, self.opened, self.seed, self.scorer = curate, sheets, opened, seed, scorer
        counts = [len(sheet.rows) for sheet in sheets]
        self.rows = np.concatenate([np.asarray(sheet.rows) for sheet in sheets])
        self.source = np.repeat(np.arange(len(sheets)), counts)
        self.texts = Texts(
            files=[sheet.words for sheet in sheets],
            file=self.source,
            start=self.rows["offset"],
            lengths=self.rows["count"].astype(np.int64),
        )
        self.alive = self.source < training
        self.evaluation = ~self.alive
        self.training, self.specific = training, self.alive & (self.source < training - general)
        self.steps: list[Step] = []
        self.gone: dict[int, tuple[str, str, int | None, float | None]] = {}  # place -> (step, why, like, similarity)

    def write(self, folder: Path, share: float | None, key: str) -> dict[str, Any]:
        before = int(self.alive.sum())
        self._filters()
        self._exact()
        pairs = self._near()
        if self.scorer:
            self._reward(self.scorer)
        self._balance()
        held = self._hold_out(share, pairs)
        self._leaks(held)
        train = self.alive & ~held
        if not train.any():
            raise DataError(
                f"the training data is empty: curation leaves none of {before:,} rows; see the steps: {self.steps}."
            )
        places = {}
        for k in range(self.training):
            for name, chosen in (("train", train), ("held", held)):
                places[f"{name}{k}"] = np.sort(self.rows["place"][chosen & (self.source == k)])
        with (folder / "places.npz").open("wb") as file:
            np.savez(file, **places)  # type: ignore[arg-type]
            entries.synced(file)
        with (folder / "dropped.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in self._dropped())
            entries.synced(lines)
        report = {
            "rows": before,
            "train": int(train.sum()),
            "held_out": int(held.sum()) if share is not None else int(self.evaluation.sum()),
            "seed": self.seed,
            "fingerprint": key,
        }
        steps = [asdict(step) for step in self.steps]
        return {"sources": self.training, "shared": share is not None, "report": report | {"steps": steps}}

    def _drop(self, step: str, gone: Mapping[int, tuple[str, int | None, float | None]], **limits: Any) -> None:
        """Takes rows out, counted by reason. `limits` is what the step was told."""
        detail: dict[str, int] = {}
        for place, (why, like, similarity) in gone.items():
            self.alive[place] = False
            self.gone[place] = (step, why, like, similarity)
            detail[why] = detail.get(why, 0) + 1
        self.steps.append(
            Step(
                name=step,
                removed=len(gone),
                left=int(self.alive.sum()),
                detail=dict(sorted(detail.items())),
                limits=limits,
            )
        )

    def _filters(self) -> None:
        gone: Gone = {}
        for place in np.flatnonzero(self.alive & (self.rows["reason"] >= 0)).tolist():
            reasons = self.sheets[self.source[place]].meta["reasons"]
            gone[place] = (reasons[self.rows["reason"][place]], None, None)
        wanted = self.curate.model_dump(mode="json")
        limits = {name: wanted[name] for name in _FILTERS if wanted[name] not in (None, False, 0, [], ())}
        self._drop("filters", gone, **limits)

    def _exact(self) -> None:
        if not self.curate.exact_duplicates:
            return
        here = np.flatnonzero(self.alive)
        first, second = duplicates.equal(self.rows["text"][here])
        gone = {
            int(j): ("equal text", int(i), 1.0)
            for i, j in zip(here[first].tolist(), here[second].tolist(), strict=True)
        }
        self._drop("exact", gone)

    def _near(self) -> duplicates.Pairs:
        """Pairs of all rows that matter, for this step and for the hold-out."""
        curate = self.curate
        limit = curate.near_duplicates
        threshold = min(curate.group_similarity, limit if limit is not None else 1.0)
        here = np.flatnonzero(self.alive | self.evaluation)
        found = duplicates.similar_pairs(self._signatures(here), self.texts.select(here), threshold)
        pairs = duplicates.Pairs(first=here[found.first], second=here[found.second], similarity=found.similarity)
        if limit is not None:
            among = self.alive[pairs.first] & self.alive[pairs.second] & (pairs.similarity >= limit)
            among &= self.rows["label"][pairs.first] == self.rows["label"][pairs.second]
            chosen = duplicates.Pairs(
                first=pairs.first[among], second=pairs.second[among], similarity=pairs.similarity[among]
            )
            gone = {
                j: ("similar text", i, round(similarity, 4))
                for j, (i, similarity) in duplicates.to_drop(chosen).items()
            }
            self._drop("near", gone, similarity=limit)
        return pairs

    def _signatures(self, places: np.ndarray) -> np.ndarray:
        """Of ascending places, in memory once."""
        source = self.source[places]
        base = np.searchsorted(self.source, np.arange(len(self.sheets)))
        own = [places[source == k] - base[k] for k in range(len(self.sheets))]
        return np.concatenate([np.asarray(s.signatures)[at] for s, at in zip(self.sheets, own, strict=True)])

    def _reward(self, scorer: reward.Scorer) -> None:
        scores = np.full(len(self.rows), np.nan)
        for k in range(self.training):
            here = np.flatnonzero(self.alive & (self.source == k))
            scores[here] = scorer.scores(self.opened[k], self.rows["place"][here])
        here = np.flatnonzero(self.alive)
        if scorer.reward.at_least is not None:
            low = here[scores[here] < scorer.reward.at_least]
        else:
            assert scorer.reward.keep is not None
            out = len(here) - round(scorer.reward.keep * len(here))
            low = here[np.argsort(scores[here], kind="stable")[:out]]
        gone: Gone = {int(place): ("low score", None, round(float(scores[place]), 4)) for place in np.sort(low)}
        self._drop("reward", gone, **scorer.reward.model_dump(exclude_none=True), rows_cut=scorer.cut)

    def _balance(self) -> None:
        balance = self.curate.balance
        if balance is None:
            return
        here = np.flatnonzero(self.alive & self.specific)
        names = [
            self.sheets[k].meta["values"][v] for k, v in zip(self.source[here], self.rows["value"][here], strict=True)
        ]
        unique, value = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
        sizes = np.bincount(value)
        at_most = balance.at_most
        limit = {"smallest": int(sizes.min()), "median": int(np.median(sizes))}.get(str(at_most), at_most)
        draw = mix(self.rows["text"][here] ^ self.rows["place"][here].astype(np.uint64), self.seed)
        order = np.lexsort((draw, value))
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        over = order[rank >= int(limit)]
        gone = {int(here[i]): (f"{balance.by} = {unique[value[i]]}", None, None) for i in np.sort(over)}
        self._drop("balance", gone, by=balance.by, at_most=int(limit))

    def _hold_out(self, share: float | None, pairs: duplicates.Pairs) -> np.ndarray:
        """bool [rows]: held out. Rows that are alike, or share their prompt, are on one side."""
        held = np.zeros(len(self.rows), bool)
        near = pairs.similarity >= self.curate.group_similarity
        if share is None:
            across = near & self.alive[pairs.first] & self.evaluation[pairs.second]  # evaluation stands behind training
            who = (pairs.first[across].tolist(), pairs.second[across].tolist(), pairs.similarity[across].tolist())
            gone: Gone = {i: ("similar to a held-out row", j, round(s, 4)) for i, j, s in zip(*who, strict=True)}
            self._drop("hold-out", gone, similarity=self.curate.group_similarity)
            return held
        if share == 0:
            return held
        here = np.flatnonzero(self.alive & self.specific)
        group = duplicates.groups(
            len(self.rows),
            (pairs.first[near], pairs.second[near]),
            tuple(here[side] for side in duplicates.equal(self.rows["prompt"][here])),
        )[here]
        held[here[drawn(self.rows["text"][group], share, self.seed, "similar rows and equal prompts")]] = True
        sizes = np.unique(group, return_counts=True)[1]
        self.steps.append(
            Step(
                name="hold-out",
                removed=0,
                left=int(self.alive.sum()) - int(held.sum()),
                detail={"held out": int(held.sum()), "groups": len(sizes), "largest group": int(sizes.max())},
                limits={"share": share, "similarity": self.curate.group_similarity},
            )
        )
        return held

    def _leaks(self, held: np.ndarray) -> None:
        evaluation = np.flatnonzero(held | self.evaluation)
        if self.curate.leak_share is None or not len(evaluation):
            return
        index = HeldOut(*self.texts.take(evaluation), self.curate.leak_ngram)
        gone: Gone = {}
        here = np.flatnonzero(self.alive & ~held)
        for part in self.texts.chunks(here):
            found = index.leaking(*self.texts.take(here[part]), self.curate.leak_share)
            for i, (k, share) in found.items():
                gone[int(here[part][i])] = ("holds a held-out row", int(evaluation[k]), round(share, 4))
        self._drop("leaks", gone, words=self.curate.leak_ngram, share=self.curate.leak_share)
        if held.any():  # `left` counts what trains
            self.steps.append(replace(self.steps.pop(), left=int((self.alive & ~held).sum())))

    def _name(self, place: int) -> str:
        table = self.opened[self.source[place]].table
        return f"{table.name}, {table.unit} {int(self.rows['row'][place])}"

    def _dropped(self) -> Iterator[dict[str, Any]]:
        for place in sorted(self.gone):
            step, why, like, similarity = self.gone[place]
            line: dict[str, Any] = {"row": self._name(place), "step": step, "why": why}
            if like is not None:
                line["like"] = self._name(like)
            if similarity is not None:
                line["score" if step == "reward" else "similarity"] = similarity
            yield line
