"""Rows of samples into the tensors of one micro-batch. The only file here that needs torch.

Labels leave here already shifted, because the fused loss works on hidden states and never sees the whole sequence of
logits; and because a shift done later, over the packed row, would train the last token of a sample to predict the
first of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

IGNORE = -100  # torch's default ignore_index
_EMPTY = 8  # tokens in the row that stands for an empty micro-batch; any small number would do

Sample = tuple[np.ndarray, np.ndarray]


def collate(rows: Sequence[Sequence[Sample]], *, pad_id: int, pad_to_multiple_of: int | None = None) -> dict[str, Any]:
    """One micro-batch. A row is a list of samples, a sample is (ids, mask), both of its own length.

    Returned, with B rows and T the longest row (rounded up to `pad_to_multiple_of`):
      input_ids     int64 [B, T], padded on the right with `pad_id`
      position_ids  int64 [B, T], from 0 in every sample; padding counts on from the row's last sample
      labels        int64 [B, T], shifted: token t+1 of the same sample if that one carries loss, else -100
      seq_lens      B lists: lengths of the samples of each row, without padding (for variable-length attention)
      packed        True when some row holds more than one sample
      num_tokens    tokens that are not padding
      num_trained   labels that are not -100

    transformers makes its block-diagonal mask from the restarts of position_ids, when `use_cache=False`. Where no row
    is packed nothing restarts, so it makes no mask and SDPA takes its causal path. There is no attention_mask on
    purpose: a two-dimensional one makes transformers ignore the restarts, and samples then see each other
    (transformers 5.23, seen on eager, sdpa and flex). An empty micro-batch gives one row of padding without labels.
    """
    lengths = [[len(ids) for ids, _ in row] for row in rows]
    width = max((sum(row) for row in lengths), default=_EMPTY)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    shape = (max(len(rows), 1), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.tile(np.arange(width, dtype=np.int64), (shape[0], 1))
    for b, row in enumerate(rows):
        start = 0
        for ids, mask in row:
            stop = start + len(ids)
            input_ids[b, start:stop] = ids
            labels[b, start : stop - 1] = np.where(mask[1:], ids[1:], IGNORE)
            position_ids[b, start:] = np.arange(width - start)
            start = stop
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "labels": torch.from_numpy(labels),
        "seq_lens": lengths,
        "packed": any(len(row) > 1 for row in lengths),
        "num_tokens": sum(map(sum, lengths)),
        "num_trained": int((labels != IGNORE).sum()),
    }
