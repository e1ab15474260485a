"""Scores of rows by a reward model: a sequence classifier with one output, as `objective: reward` and TRL make them.

Imports torch and transformers when it is used. Left out: scoring over several devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ....launcher.errors import UserError
from ....launcher.schema_curate import Reward
from ..samples import Sample, Samples
from ..tables import file_digest
from ..turns import Chat
from .rows import texts_of


def content(reward: Reward, memo: Path) -> list[str]:
    """Identity of a model in a folder by its files; of one on the Hub by its name."""
    folder = Path(reward.model).expanduser()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")])
    return [reward.model] if not files else [file_digest(file, memo) for file in files]


class Scorer:
    """Loads the model once; on a GPU if there is one. `cut` counts rows that were longer than the model reads."""

    def __init__(self, reward: Reward):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.reward, self.cut = reward, 0
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(reward.model)
            model = AutoModelForSequenceClassification.from_pretrained(reward.model)
        except (OSError, ValueError) as error:
            raise UserError(f"data.curate.reward: {reward.model}: {' '.join(str(error).split())}") from None
        if model.config.num_labels != 1:
            raise UserError(
                f"data.curate.reward: {reward.model} has {model.config.num_labels} outputs, and a reward model has one."
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model.config.pad_token_id = self._tokenizer.pad_token_id  # where the model looks for the last token of a row
        self._tokenizer.padding_side = "right"
        positions = getattr(model.config, "max_position_embeddings", None)
        self._longest = min(positions or 1 << 30, self._tokenizer.model_max_length)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()

    def scores(self, samples: Samples, places: np.ndarray) -> np.ndarray:
        """float64, one for each of the ascending places (`samples.py`) of a source."""
        wanted, found = set(places.tolist()), []
        waiting: list[Sample] = []
        for block in samples.blocks():
            for chunk in block.chunks():
                waiting += [sample for sample in chunk if sample.place in wanted]
                while len(waiting) >= self.reward.batch:
                    found += self._batch(waiting[: self.reward.batch])
                    waiting = waiting[self.reward.batch :]
        found += self._batch(waiting) if waiting else []
        return np.array(found)

    def _batch(self, samples: list[Sample]) -> list[float]:
        import torch

        encoded = [self._ids(sample) for sample in samples]
        self.cut += sum(len(ids) > self._longest for ids in encoded)
        batch = self._tokenizer.pad({"input_ids": [ids[: self._longest] for ids in encoded]}, return_tensors="pt")
        with torch.inference_mode():
            scores: list[float] = self._model(**batch.to(self._device)).logits[:, 0].double().tolist()
        return scores

    def _ids(self, sample: Sample) -> list[int]:
        example: Any = sample.example
        if isinstance(example, Chat) and self._tokenizer.chat_template:
            ids: Any = self._tokenizer.apply_chat_template(example.messages, return_dict=False)
        else:
            prompt, answer, _ = texts_of(example)
            ids = self._tokenizer(f"{prompt}\n{answer}" if prompt else answer, verbose=False)["input_ids"]
        return list(ids)
