"""The verdict over an allocation: pure parts here, on real ranks in tests/slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trebuchet.training.allocation import UNSEEN, Seen, examine, problems

GOOD = [
    Seen(rank=i, node=f"n{1 + i // 2}", gpu=f"GPU-{i}", versions={"torch": "2.13.0", "nccl": "2.28"}, clock=1000.0 + i / 10,
         folder=None, free_bytes=2**40, model=None)
    for i in range(8)
]  # fmt: skip


def test_a_good_allocation_has_no_problems() -> None:
    assert problems(GOOD, needed_bytes=2**39) == []


@pytest.mark.parametrize(
    ("rank", "change", "words"),
    [
        (5, {"gpu": "GPU-4"}, "n3: ranks 4, 5 have the same GPU GPU-4"),
        (7, {"versions": {"torch": "2.12.0", "nccl": "2.28"}}, "n4: torch 2.12.0, and 2.13.0 elsewhere"),
        (6, {"versions": {"torch": "2.13.0"}}, "n4: nccl none, and 2.28 elsewhere"),
        (3, {"clock": 1400.0}, "n2 (rank 3): its clock is +400 s off"),
        (
            0,
            {"folder": "cannot be written to: Read-only file system"},
            "n1 (rank 0): the run folder: cannot be written to",
        ),
        (2, {"free_bytes": 2**30}, "n2: 1.0 GiB free where the run folder is, 512.0 needed"),
        (4, {"model": "no such file"}, "n3 (rank 4): the model: no such file"),
    ],
)
def test_the_faulty_node_is_named(rank: int, change: dict[str, object], words: str) -> None:
    ranks = [replace(one, **change) if one.rank == rank else one for one in GOOD]
    found = problems(ranks, needed_bytes=2**39)
    assert len(found) == 1 and found[0].startswith(words)


def test_a_node_with_a_folder_of_its_own_is_named_once() -> None:
    """Rank 3 does not see what rank 4 wrote, and rank 5 not what rank 6 wrote: n3, which has both 4 and 5, is the one."""
    unseen = f"{UNSEEN} (No such file or directory); is it on the shared file system?"
    ranks = [replace(one, folder=unseen) if one.rank in (3, 5) else one for one in GOOD]
    assert problems(ranks) == [
        "n3: the run folder: this node does not see what the others write there; is it on the shared file system?"
    ]
    two = [replace(one, folder=unseen, node=f"n{one.rank}") for one in GOOD[:2]]
    assert [text[:11] for text in problems(two)] == ["n0 (rank 0)", "n1 (rank 1)"]  # with two nobody can tell


def test_a_rank_that_cannot_write_is_not_blamed_on_its_neighbour() -> None:
    broken = {4: "cannot be written to: Read-only file system", 3: f"{UNSEEN} (No such file or directory)"}
    ranks = [replace(one, folder=broken.get(one.rank), free_bytes=-1 if one.rank == 4 else 2**40) for one in GOOD]
    assert problems(ranks, needed_bytes=2**30) == [f"n3 (rank 4): the run folder: {broken[4]}"]


def test_one_rank_examines_itself(tmp_path: Path) -> None:
    report = examine(tmp_path, torch.device("cpu"), needed_bytes=1)
    assert report["problems"] == [] and report["all_reduce_gbps"] is None and not list(tmp_path.iterdir())
    assert examine(tmp_path, torch.device("cpu"), needed_bytes=2**60)["problems"]


def test_a_model_that_does_not_open_is_a_sentence(tmp_path: Path) -> None:
    def missing() -> Path:
        raise FileNotFoundError("the weights are not here")

    report = examine(tmp_path, torch.device("cpu"), model=missing)
    assert len(report["problems"]) == 1 and report["problems"][0].endswith("the model: the weights are not here")
