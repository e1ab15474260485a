"""Packing, order and sharing: every sample in exactly one row, every row of a batch on exactly one rank."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.training.data import Order, pack, share


@given(lengths=st.lists(st.integers(1, 64), max_size=200), limit=st.integers(64, 90), seed=st.integers(0, 2**32 - 1))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int], limit: int, seed: int) -> None:
    rows = pack(lengths, limit, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= limit for row in rows)
    assert rows == pack(lengths, limit, seed)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 64), max_size=60))
def test_each_sample_goes_into_the_fullest_row_that_takes_it(lengths: list[int]) -> None:
    """The same algorithm by looking at every row: quadratic, and free of bits."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [s for s in spaces if s >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(64 - length)
    filled = sorted(64 - sum(lengths[i] for i in row) for row in pack(lengths, 64, 0))
    assert filled == sorted(spaces)


def test_a_lognormal_mix_fills_its_rows() -> None:
    """98 % is what the project asks for; measured here 99.98 %."""
    lengths = np.random.default_rng(0).lognormal(5.9, 0.8, 20_000).astype(int).clip(1, 4096)
    rows = pack(lengths, 4096, 0)
    assert lengths.sum() / (len(rows) * 4096) > 0.98
    first, last = (np.mean([len(row) for row in half]) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    assert first == pytest.approx(last, rel=0.2)  # shuffled: not the long samples first


def test_without_packing_a_row_is_a_sample_and_lengths_are_checked() -> None:
    assert pack([5, 7, 2], 8, 0, packing=False) == ((0,), (1,), (2,))
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.8"):
        pack([5, 9], 8, 0)


orders = st.builds(
    Order,
    n_rows=st.integers(1, 60),
    global_batch=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    epochs=st.floats(0.1, 3.5),
)


@given(order=orders)
def test_every_epoch_sees_every_row_once(order: Order) -> None:
    stream = [row for step in range(order.steps) for row in order.batch(step)]
    assert len(stream) == order.total_rows == max(1, round(order.epochs * order.n_rows))
    assert all(len(order.batch(step)) == order.global_batch for step in range(order.steps - 1))
    for start in range(0, len(stream), order.n_rows):
        epoch = stream[start : start + order.n_rows]
        assert len(set(epoch)) == len(epoch) and (
            len(epoch) < order.n_rows or sorted(epoch) == list(range(order.n_rows))
        )
    assert order.epoch(order.steps) == pytest.approx(order.total_rows / order.n_rows)


def test_order_is_a_function_of_seed_and_step() -> None:
    """Pinned: a resumed run must see the batches that the first one would have seen, whatever NumPy it has."""
    order = Order(n_rows=10, global_batch=4, seed=7, max_steps=6)
    batches = [order.batch(step) for step in range(6)]
    assert [order.batch(step) for step in reversed(range(6))] == batches[::-1]
    assert batches[:3] == [(6, 3, 4, 9), (0, 2, 8, 7), (5, 1, 1, 3)]
    assert batches != [Order(n_rows=10, global_batch=4, seed=8, max_steps=6).batch(step) for step in range(6)]
    assert order.steps == 6 and all(len(batch) == 4 for batch in batches)
    with pytest.raises(IndexError):
        order.batch(6)


@given(batch=st.lists(st.integers(0, 1000), max_size=40, unique=True), micro=st.integers(1, 5), world=st.integers(1, 4))
def test_ranks_share_a_batch_exactly_and_in_step(batch: list[int], micro: int, world: int) -> None:
    shares = [share(batch, rank, world, micro) for rank in range(world)]
    assert sorted(row for mine in shares for rows in mine for row in rows) == sorted(batch)
    assert {len(mine) for mine in shares} == {max(1, math.ceil(len(batch) / (world * micro)))}
    assert all(len(rows) <= micro for mine in shares for rows in mine)
    counts = [sum(map(len, mine)) for mine in shares]
    assert max(counts) - min(counts) <= 1


def test_nothing_here_imports_torch_before_tensors_are_asked_for() -> None:
    code = "import sys, trebuchet.training.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout.strip() == "[]"


def test_a_lognormal_mix_fills_rows_of_4096_to_98_percent_and_more() -> None:
    """100,000 lengths of mean about 500 and 1,080, as conversations have them; best fit decreasing leaves under 0.1 %."""
    draw = np.random.Generator(np.random.PCG64(0))
    for mean in (5.8, 6.6):
        lengths = np.clip(draw.lognormal(mean, 0.9, 100_000).astype(np.int64), 1, 4096)
        rows = pack(lengths, 4096, seed=0)
        assert lengths.sum() / (len(rows) * 4096) >= 0.98
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert max(int(lengths[list(row)].sum()) for row in rows) <= 4096
