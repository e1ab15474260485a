"""Checkpoints: what is written comes back to the bit, and what is damaged is never resumed from."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.strategies import states
from trebuchet.training import checkpoint
from trebuchet.training.judge import Best
from trebuchet.training.loop import due
from trebuchet.training.optim import make_optimizer
from trebuchet.training.progress import keep_until

FILES = ["optimizer.safetensors", "rng-0.safetensors", "state.json", "trainable.safetensors"]


class Net(torch.nn.Module):
    """A frozen layer, a trained one, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(70, 70).requires_grad_(False)
        self.trained = torch.nn.Linear(70, 70)
        self.norm = torch.nn.LayerNorm(70)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.trained(self.frozen(x)))


def trained(optimizer: str, steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    made = make_optimizer(net.named_parameters(), optimizer, 1e-2, 0.1)
    for _ in range(steps):
        step(net, made)
    return net, made


def step(net: Net, optimizer: torch.optim.Optimizer) -> float:
    loss = net(torch.randn(4, 70)).pow(4).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def saved(root: Path, number: int, net: Net, optimizer: torch.optim.Optimizer) -> Path:
    write, state = partial(states.save, model=net, optimizer=optimizer), {"identity": {"data": "x"}}
    saver = checkpoint.Saver(RunFolder(root), rank=0, barrier=lambda: None)
    saver.save(number, lambda folder, background: write(folder), state, keep=9)
    return RunFolder(root).checkpoint(number)


def loaded(path: Path, net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return checkpoint.load(path, partial(states.load, model=net, optimizer=optimizer), rank=0)


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Weights, moments and all three random states: the next steps are those of the run that was not interrupted."""
    net, optimizer = trained("adamw")
    path = saved(tmp_path, 3, net, optimizer)
    quiet = [step(net, optimizer) for _ in range(3)] + [random.random(), float(np.random.rand()), random.gauss(0, 1)]

    other, fresh = trained("adamw", steps=0)
    random.seed(99)
    np.random.seed(99)
    state = loaded(path, other, fresh)
    assert state["step"] == 3 and state["identity"] == {"data": "x"}
    assert [step(other, fresh) for _ in range(3)] + [
        random.random(),
        float(np.random.rand()),
        random.gauss(0, 1),
    ] == quiet
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_the_folder_holds_safe_files_and_only_what_is_trained(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    net, optimizer = trained("adamw")
    path = saved(tmp_path, 3, net, optimizer)
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES, "manifest.json"])
    weights = load_file(path / "trainable.safetensors")
    assert set(weights) == {"trained.weight", "trained.bias", "norm.weight", "norm.bias"}
    assert set(load_file(path / "optimizer.safetensors")) == {
        f"{n}/{s}" for n in weights for s in ("step", "exp_avg", "exp_avg_sq")
    }
    manifest = json.loads((path / "manifest.json").read_text())
    assert {name: size for name, (size, _) in manifest.items()} == {
        name: (path / name).stat().st_size for name in FILES
    }


def truncate(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 100)


def flip_one_bit(path: Path) -> None:
    with (path / "trainable.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "optimizer.safetensors is missing or has another size": truncate,
    "trainable.safetensors has another content": flip_one_bit,
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "it has no readable manifest": lambda path: (path / "manifest.json").unlink(),
    "it has no readable manifest, ": lambda path: (path / "manifest.json").write_text('{"state.json": [1'),
    "it has no readable manifest, so": lambda path: (path / "manifest.json").write_text('{"state.json": 5}'),
    "it has no readable manifest, so it": lambda path: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path: Path, reason: str) -> None:
    net, optimizer = trained("adamw")
    older, newer = saved(tmp_path, 2, net, optimizer), saved(tmp_path, 10, net, optimizer)
    said: list[str] = []
    assert checkpoint.latest(RunFolder(tmp_path), said.append) == newer and not said
    DAMAGES[reason](newer)
    assert checkpoint.latest(RunFolder(tmp_path), said.append) == older
    assert len(said) == 1 and said[0].startswith(f"step-10 is not resumed from: {reason}")


def test_a_save_that_was_interrupted_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = trained("adamw")
    kept = saved(tmp_path, 1, net, optimizer)
    monkeypatch.setattr(checkpoint, "_seal", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        saved(tmp_path, 2, net, optimizer)
    monkeypatch.undo()
    assert checkpoint.all_of(RunFolder(tmp_path)) == [kept]
    saved(tmp_path, 3, net, optimizer)
    checkpoint.prune(RunFolder(tmp_path), keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    net, optimizer = trained("adamw")
    path = saved(tmp_path, 1, net, optimizer)
    net.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="other parameters than this model"):
        loaded(path, net, optimizer)


def test_loading_does_not_touch_what_was_loaded(tmp_path: Path) -> None:
    """A second save of the same step replaces the first, and it is the same to the byte."""
    net, optimizer = trained("adamw")
    path = saved(tmp_path, 3, net, optimizer)
    before = {name: (path / name).read_bytes() for name in FILES}
    loaded(path, net, optimizer)
    assert {name: (saved(tmp_path, 3, net, optimizer) / name).read_bytes() for name in FILES} == before


@settings(max_examples=25)
@given(st.lists(st.none() | st.floats(0, 9), min_size=1, max_size=8), st.integers(1, 3), st.booleans())
def test_the_newest_and_the_best_are_kept(losses: list[float | None], keep: int, keep_best: bool) -> None:
    """Through the saver, a save at a time; a step that was not evaluated has no loss and is never the best."""
    with tempfile.TemporaryDirectory() as root:
        saver = checkpoint.Saver(RunFolder(Path(root)), rank=0, barrier=lambda: None)
        for step, loss in enumerate(losses, 1):
            state = {} if loss is None else {"held_out_loss": loss}
            saver.save(step, lambda folder, background: None, state, keep=keep, keep_best=keep_best)
        wanted = set(range(1, len(losses) + 1)[-keep:])
        known = [(loss, step) for step, loss in enumerate(losses, 1) if loss is not None]
        if keep_best and known:
            wanted.add(min(known)[1])
        assert {checkpoint.step_of(path) for path in checkpoint.all_of(RunFolder(Path(root)))} == wanted


def test_a_broken_newer_one_does_not_push_out_what_a_resumed_run_saves(tmp_path: Path) -> None:
    """Step 10 is broken, so the run goes on from 2 and saves 3: that is all there is to resume from, and it must stay."""
    net, optimizer = trained("adamw")
    saved(tmp_path, 2, net, optimizer)
    truncate(saved(tmp_path, 10, net, optimizer))
    folder, said = RunFolder(tmp_path), list[str]()
    assert checkpoint.latest(folder, said.append) == folder.checkpoint(2) and len(said) == 1
    saver = checkpoint.Saver(folder, rank=0, barrier=lambda: None)
    saver.save(3, lambda beside, background: states.save(beside, net, optimizer), {}, keep=1)
    assert checkpoint.all_of(folder) == [folder.checkpoint(3)]
    assert checkpoint.latest(folder, said.append) == folder.checkpoint(3) and len(said) == 1


def test_the_best_is_remembered_only_while_its_weights_are_there(make_loop: Callable[..., Any]) -> None:
    """By `evaluation.best`: the one saved after step 1 survives two more saves and a resume. Damaged, or of another figure, it is no
    longer the best, and a later one counts; nothing fails at the end of the run."""
    loop = make_loop({"evaluation.best": "accuracy", "checkpointing.keep": 1, "checkpointing.keep_best": False})
    folder = loop.runtime.folder
    for step, accuracy in ((1, 0.9), (2, 0.5), (3, 0.7)):
        loop.stepper.step([loop.batch(loop.order.batch(step - 1))])
        if loop.best.see(step, accuracy):
            best = [p.detach().clone() for p in loop.stepper.layout.inside.parameters()]
        loop.save(step)
    assert checkpoint.all_of(folder) == [folder.checkpoint(1), folder.checkpoint(3)]
    assert loop.resume() == 3 and (loop.best.step, loop.best.value, loop.best.since) == (1, 0.9, 2)
    loop.take_best()
    assert all(torch.equal(a, b) for a, b in zip(best, loop.stepper.layout.inside.parameters(), strict=True))

    loop.evaluation = loop.evaluation.model_copy(update={"best": "loss"})  # as `resume --set evaluation.best=loss`
    loop.best = Best(loop.evaluation)
    assert loop.resume() == 3 and loop.best.step is None
    loop.evaluation = loop.evaluation.model_copy(update={"best": "accuracy"})
    loop.best = Best(loop.evaluation)
    flip_one_bit(folder.checkpoint(1))
    assert loop.resume() == 3 and loop.best.step is None
    loop.take_best()  # none: the last weights stay


@given(st.floats(1e-4, 0.9999) | st.integers(1, 50), st.integers(1, 5000))
def test_due_is_even_and_ends_with_the_run_where_it_divides(every: float, steps: int) -> None:
    found = sorted(due(every, steps))
    assert all(1 <= s <= steps for s in found)
    gap = every if every >= 1 else max(1.0, steps * every)
    assert all(abs((b - a) - gap) < 1 + 1e-6 for a, b in itertools.pairwise(found))
    assert abs(len(found) - int(steps / gap + 1e-9)) <= 1
    if every >= 1:
        assert found == [s for s in range(1, steps + 1) if s % every == 0]


@pytest.mark.parametrize("every", [0.1, 0.05, 0.2, 0.25, 0.5, 0.02])
def test_a_whole_share_of_the_run_ends_with_the_run(every: float) -> None:
    assert all(max(due(every, steps)) == steps for steps in range(1, 500))


def test_lines_of_steps_to_come_and_half_lines_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 3)] + [json.dumps({"step": 2, "eval_loss": 2.0})]
    file.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert [json.loads(line) for line in keep_until(file, 2).read_text().splitlines()] == [
        json.loads(lines[i]) for i in (0, 1, 3)
    ]
    assert keep_until(tmp_path / "absent", 2).name == "absent"
