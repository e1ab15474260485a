"""What must not change a step: how the batch is cut, packing, checkpointing, kernels, ranks, and where the reference comes from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trebuchet.launcher import api
from trebuchet.training.data import share
from trebuchet.training.objectives.base import document_batch

from .conftest import COUNT, gradient

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "sft_weight": 0.5},
    "orpo": {"name": "orpo"},
    "simpo": {"name": "simpo"},
    "cpo": {"name": "cpo"},
    "kto": {"name": "kto"},
    "reward": {"name": "reward", "center": 0.01},
}
ALL = pytest.mark.parametrize("name", OBJECTIVES)
# fp32 sums in another order. A mean per micro-batch would be off by tens of per cent on these uneven rows.
SAME = 2e-6


def step(loop: Any, parts: list[tuple[int, ...]]) -> tuple[Any, torch.Tensor]:
    """(result, gradient as one vector) of a step over `parts`; the weights stay."""
    seen: dict[str, torch.Tensor] = {}
    model = loop.stepper.model_inside()
    hook = loop.stepper.optimizer.register_step_pre_hook(lambda *_: seen.update(gradient(model)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = loop.stepper.step([loop.batch(part) for part in parts])
    hook.remove()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return result, torch.cat([seen[name].flatten() for name in sorted(seen)])


def close(a: tuple[Any, torch.Tensor], b: tuple[Any, torch.Tensor], relative: float = SAME) -> None:
    assert b[1].norm() > 1e-4
    assert (a[1] - b[1]).norm() <= relative * b[1].norm()
    assert a[0].loss == pytest.approx(b[0].loss, rel=relative)
    assert a[0].figures == pytest.approx(b[0].figures, rel=1e-4, abs=1e-6)


@ALL
def test_neither_cutting_the_batch_nor_packing_it_changes_the_step(compare: Callable[..., Any], name: str) -> None:
    loop = compare(OBJECTIVES[name])
    rows = tuple(range(len(loop.rows)))
    whole = step(loop, [rows])
    assert {"accuracy", "margin"} <= whole[0].figures.keys()
    for micro in (1, 5):
        close(step(loop, share(rows, 0, 1, micro)), whole)
    close(step(loop, [rows, ()]), whole)  # an empty micro-batch adds nothing
    packed = compare(OBJECTIVES[name], {"data.packing": True})
    rows = tuple(range(len(packed.rows)))
    assert len(rows) < COUNT and max(map(len, packed.rows)) > 1
    close(step(packed, [rows]), whole, 5e-6)
    close(step(packed, share(rows, 0, 1, 1)), whole, 5e-6)


@ALL
def test_checkpointing_and_kernels_change_nothing(compare: Callable[..., Any], name: str) -> None:
    rows = tuple(range(COUNT))
    plain = step(compare(OBJECTIVES[name], {"strategy.kernels": "off"}), [rows])
    full = compare(OBJECTIVES[name], {"strategy.kernels": "on", "strategy.checkpointing": "full"})
    assert full.stepper.model_inside().is_gradient_checkpointing
    close(step(full, [rows]), plain, 5e-6)


def test_a_pair_does_not_see_its_other_side(compare: Callable[..., Any]) -> None:
    """Another rejected answer in a packed row leaves the chosen one's log-probability where it was."""
    loop = compare({"name": "dpo"}, {"data.packing": True})
    row = max(loop.rows, key=len)
    documents = [d for i in row for d in loop.units.documents(i)]
    found = []
    for change in (0, 1):
        ids, mask = documents[1]
        changed = [documents[0], ((ids + change) % 300, mask), *documents[2:]]
        batch = document_batch([changed], packing=True, pad_id=0, width=None)
        with torch.no_grad():
            from trebuchet.training.objectives.base import per_document, token_logps

            found.append(per_document(token_logps(loop.stepper.model, batch, kernels=True), batch))
    same = torch.tensor([k != 1 for k in range(len(documents))])
    assert torch.equal(found[0][same], found[1][same]) and found[0][1] != found[1][1]


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_three_references_are_one(compare: Callable[..., Any], name: str, method: str) -> None:
    found = {}
    for reference in ("adapters_off", "precomputed", "copy"):
        changes = {"strategy.method": method, "strategy.lora": {"r": 4}}
        loop = compare({"name": name, "reference": reference}, changes)
        assert type(loop.stepper.objective.reference).__name__.lower() == reference.replace("_", "")
        found[reference] = step(loop, [tuple(range(COUNT))])
    assert abs(found["copy"][0].figures["margin"]) > 1e-4  # the policy has moved, so a wrong reference would show
    for reference in ("adapters_off", "precomputed"):
        close(found[reference], found["copy"], 1e-5)


def test_precomputed_log_probabilities_are_cached_by_content(
    compare: Callable[..., Any], capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path / "cache"))
    first = compare({"name": "dpo"}, moved=False)
    assert "train: computed" in capfd.readouterr().err
    again = compare({"name": "dpo", "beta": 0.3}, moved=False)
    assert "train: read from the cache" in capfd.readouterr().err
    assert (first.units.reference == again.units.reference).all()
    compare({"name": "dpo"}, {"strategy.kernels": "off"}, moved=False)
    assert "train: computed" in capfd.readouterr().err


def test_a_resumed_run_compares_with_the_untrained_model(
    compare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the cache was lost in between: it is made again before the checkpoint is loaded."""
    loop = compare({"name": "dpo"}, {"optimization.learning_rate": 1e-3}, moved=False)
    for number in range(3):
        loop.stepper.step([loop.batch(loop.order.batch(number))])
    loop.save(3)
    monkeypatch.setenv("TREBUCHET_CACHE", str(tmp_path / "another cache"))
    resumed = compare({"name": "dpo"}, {"optimization.learning_rate": 1e-3}, moved=False)
    resumed.runtime.folder = loop.runtime.folder
    assert resumed.resume() == 3
    assert (resumed.units.reference == loop.units.reference).all()
    batches = [[made.batch(made.order.batch(3))] for made in (loop, resumed)]
    assert loop.stepper.step(batches[0]) == resumed.stepper.step(batches[1])


# Every objective over every layout, all in one pair of processes. The method of each is one that its reference needs.
METHOD = {"dpo": "lora", "orpo": "full", "simpo": "full", "cpo": "lora", "kto": "full", "reward": "qlora"}
LAYOUTS = {layout: list(OBJECTIVES) for layout in ("ddp", "fsdp2", "zero3")}
# The rest of what sft has: (ranks, keys of the strategy, fields of the plan that no planner would
# choose for a CPU).
MORE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fsdp2 offload": (2, {"parallel": "fsdp2"}, {"offload": "params"}),
    "zero3 offload": (2, {"parallel": "zero3"}, {"offload": "params"}),
    "fsdp2 checkpointing": (2, {"parallel": "fsdp2", "checkpointing": "full"}, {}),
    "hsdp": (4, {"parallel": "fsdp2", "dp_replicate": 2}, {}),
    "int8": (2, {"parallel": "ddp", "method": "qlora", "quant": {"type": "int8"}}, {}),
}
CELLS = {
    **{(layout, name): (2, {"parallel": layout}, {}) for layout, names in LAYOUTS.items() for name in names},
    **{(layout, name): cell for layout, cell in MORE.items() for name in (OBJECTIVES if layout != "int8" else ["dpo"])},
}


@pytest.fixture(scope="module")
def on_ranks(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any], compared_files: dict[str, str]
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(layout or "one", objective) -> what `ranks.py` found: three steps and their held-out figures, five rows a step, so that one of
    two ranks has a row less."""
    from .ranks import measure

    root = tmp_path_factory.mktemp("ranks")

    def folder(name: str, layout: str | None, ranks: int, strategy: dict[str, Any], chosen: dict[str, Any]) -> str:
        kind = "judged" if name == "kto" else "pairs"
        changes = {
            "data.train": compared_files[kind], "data.eval": compared_files[f"{kind}-eval"], "data.packing": False,
            "objective": OBJECTIVES[name], "optimization.global_batch_size": 5, "optimization.micro_batch": 2,
            "optimization.max_steps": 3, "optimization.learning_rate": 1e-3, "optimization.warmup": 0, "tracking": [],
            "strategy.method": METHOD[name], "strategy.lora": {"r": 4}, "cluster": {"name": "local", "processes": ranks},
            **{f"strategy.{key}": value for key, value in strategy.items()},
        }  # fmt: skip
        made, plan = api.begin(tiny_config(changes, output=str(root / f"{name}-{layout}".replace(" ", "-"))))
        assert plan.chosen is not None
        plan = plan.model_copy(update={"chosen": plan.chosen.model_copy(update=chosen)})
        made.plan.write_text(plan.model_dump_json())
        made.logs.mkdir()
        return str(made.root)

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for ranks in (2, 4):
        folders = {
            (layout, name): folder(name, layout, *cell) for (layout, name), cell in CELLS.items() if cell[0] == ranks
        }
        found |= zip(folders, on_so_many(ranks, root / f"{ranks}.json", list(folders.values())), strict=True)
    alone = {("one", name): folder(name, "one", 1, {}, {}) for name in OBJECTIVES}
    alone["one int8", "dpo"] = folder("dpo", "one int8", 1, {**MORE["int8"][1], "parallel": "none"}, {})
    return found | {cell: measure(Path(one)) for cell, one in alone.items()}


def on_so_many(ranks: int, out: Path, folders: list[str]) -> list[Any]:
    """What `ranks.py` found for each run folder, on so many processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks.py")), str(out), *folders],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)[-4000:]
    found: list[Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), list(CELLS))
def test_ranks_train_what_one_does(
    on_ranks: dict[tuple[str, str], list[dict[str, float]]], layout: str, name: str
) -> None:
    """The third step carries two of Adam's, whose small moments turn rounding into more than rounding."""
    alone = on_ranks["one int8" if layout == "int8" else "one", name]
    for mine, theirs in zip(on_ranks[layout, name], alone, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)
