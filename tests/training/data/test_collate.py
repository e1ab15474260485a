"""Tensors of a micro-batch, and that a packed sample gets the loss and the gradient it gets alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trebuchet.training.data import pack, share
from trebuchet.training.data.collate import IGNORE, Sample, collate

VOCABULARY = 97


def samples(lengths: list[int], seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for length in lengths:
        mask = rng.integers(0, 2, length).astype(np.uint8)
        mask[0], mask[-1] = 0, length > 1
        out.append((rng.integers(3, VOCABULARY, length).astype(np.int32), mask))
    return out


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # too small for more; on a busy machine threads only wait for each other
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # with the default 0.02 logits are so flat that a leak moves the loss by less than 1e-3
    )
    return LlamaForCausalLM(config).float().eval()


def loss_sum(model: LlamaForCausalLM, rows: list[list[Sample]], *, multiple: int | None = None) -> torch.Tensor:
    """As the loop computes it: logits against labels that are shifted already, summed."""
    batch = collate(rows, pad_id=0, pad_to_multiple_of=multiple)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return _summed(logits, batch["labels"])


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits.flatten(0, 1), labels.flatten()
    return torch.nn.functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")


def alone(model: LlamaForCausalLM, sample: Sample) -> torch.Tensor:
    """The reference: one sample, no padding, transformers' own shift."""
    ids = torch.from_numpy(sample[0].astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(sample[1])[None] > 0, ids, IGNORE)
    return model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != IGNORE).sum()


def test_packed_rows_equal_each_sample_alone(llama: LlamaForCausalLM) -> None:
    """Rows of several samples, of one, with padding, to a multiple. 1e-5: fp32 sums in another order (5e-8 seen). Where
    samples see their neighbours the loss moves by 7 %, as the last lines show."""
    parts = samples([7, 1, 20, 33, 5, 12])
    rows = [[parts[0], parts[1], parts[2]], [parts[3], parts[4]], [parts[5]]]
    total, gradients = _with_gradients(llama, lambda: loss_sum(llama, rows, multiple=16))
    reference, expected = _with_gradients(
        llama, lambda: torch.stack([alone(llama, p) for p in parts if p[1].any()]).sum()
    )
    assert total == pytest.approx(reference, rel=1e-5)
    for name, gradient in expected.items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=atol, msg=name)
    batch = collate(rows, pad_id=0)
    leaking = llama(input_ids=batch["input_ids"], use_cache=False).logits  # positions count on: one document a row
    with pytest.raises(AssertionError):
        assert _summed(leaking, batch["labels"]).item() == pytest.approx(reference, rel=1e-3)


def _with_gradients(model: LlamaForCausalLM, loss: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = loss()
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_of_packed_rows_equal_those_of_each_sample_alone(llama: LlamaForCausalLM) -> None:
    parts = samples([7, 1, 20, 33, 5])
    batch = collate([parts], pad_id=0, pad_to_multiple_of=8)
    with torch.no_grad():
        logits = llama(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        at = 0
        for ids, _ in parts:
            one = llama(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
            torch.testing.assert_close(logits[at : at + len(ids)], one, rtol=0, atol=1e-5)
            at += len(ids)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_loss_of_a_global_batch_is_the_same_at_any_world_size(world: int, llama: LlamaForCausalLM) -> None:
    parts = samples([7, 3, 20, 30, 5, 12, 9, 2, 16, 31, 4])
    rows = pack([len(ids) for ids, _ in parts], 32, 0)
    with torch.no_grad():
        sums = [
            loss_sum(llama, [[parts[i] for i in rows[r]] for r in micro])
            for rank in range(world)
            for micro in share(range(len(rows)), rank, world, 2)
        ]
        reference = torch.stack([alone(llama, part) for part in parts]).sum()
    assert torch.stack(sums).sum().item() == pytest.approx(reference.item(), rel=1e-5)


@settings(max_examples=50)
@given(
    shape=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    multiple=st.none() | st.integers(1, 16),
)
def test_tensors_token_by_token(shape: list[list[int]], multiple: int | None) -> None:
    rows = [samples(lengths, seed=b) for b, lengths in enumerate(shape)]
    batch = collate(rows, pad_id=1, pad_to_multiple_of=multiple)
    width = batch["input_ids"].shape[1]
    assert width == -(-max(map(sum, shape)) // (multiple or 1)) * (multiple or 1)
    assert batch["seq_lens"] == shape and batch["packed"] == any(len(lengths) > 1 for lengths in shape)
    assert batch["num_tokens"] == sum(map(sum, shape))
    trained = 0
    for b, row in enumerate(rows):
        expected: list[tuple[int, int, int]] = []
        for ids, mask in row:
            for t, token in enumerate(ids):
                label = int(ids[t + 1]) if t + 1 < len(ids) and mask[t + 1] else IGNORE
                expected.append((int(token), t, label))
        after = len(row[-1][0])
        expected += [(1, after + t, IGNORE) for t in range(width - len(expected))]
        found = [batch[key][b].tolist() for key in ("input_ids", "position_ids", "labels")]
        assert list(zip(*found, strict=True)) == expected
        trained += sum(label != IGNORE for _, _, label in expected)
    assert batch["num_trained"] == trained


def test_an_empty_micro_batch_has_a_row_and_no_loss(llama: LlamaForCausalLM) -> None:
    batch = collate([], pad_id=5)
    assert batch["input_ids"].shape[0] == 1 and batch["num_tokens"] == batch["num_trained"] == 0
    llama.zero_grad()
    total = loss_sum(llama, [])
    total.backward()  # ranks without rows still run the collectives of a backward pass
    assert total.item() == 0 and all(
        not parameter.grad.any() for parameter in llama.parameters() if parameter.grad is not None
    )
