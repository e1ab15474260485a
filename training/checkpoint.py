"""Checkpoints: everything that a step depends on, in safetensors and JSON, never a pickle.

    checkpoints/step-N/
        trainable.safetensors, optimizer.safetensors     of layouts without shards (strategies/states.py), or
        shard-R-….safetensors                            of each rank's shards (strategies/sharded_states.py)
        rng-R.safetensors        the random states of rank R
        state.json               step, schedule, held-out loss if just measured, the fingerprints that a resume must find again
        manifest.json            sizes and SHA-256 of the others, written last

Written beside, synced, renamed; a folder without a valid manifest is never resumed from, and saying so is a line of the log. In the
background, training goes on after the values were copied; the rename comes when all ranks have written. Left out: what a layout
writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..launcher.run_folder import RunFolder

MANIFEST = "manifest.json"
Say = Callable[[str], None]


Write = Callable[[Path, bool], "Future[None] | None"]


@dataclass
class Saver:
    """Saves of one run, at most one of them in the background. Every rank has one and calls it in step with the others."""

    folder: RunFolder
    rank: int
    barrier: Callable[[], None]
    pending: Future[None] | None = None
    seconds: float = 0.0  # of the last save that was completed, rank 0

    def save(
        self,
        step: int,
        write: Write,
        state: dict[str, Any],
        *,
        keep: int,
        keep_best: bool = False,
        also: int | None = None,
        background: bool = False,
    ) -> None:
        """Writes `checkpoints/step-N` and removes what is not kept. `write(folder, background)` adds what the layout saves."""
        self.wait()
        began = time.perf_counter()
        final = self.folder.checkpoint(step)
        beside = final.with_name(f".{final.name}.writing")
        if self.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.barrier()
        save_file(rng_state(), beside / f"rng-{self.rank}.safetensors")
        if self.rank == 0:
            (beside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        written = write(beside, background)
        self.barrier()

        def complete() -> None:
            if written is not None:
                written.result()
            if self.rank == 0:
                _seal(beside)
                if final.exists():  # a resume that replays the same steps: the bytes are the same, the newer one wins
                    shutil.rmtree(final)
                os.replace(beside, final)
                _sync(final.parent)
                prune(self.folder, keep, keep_best, also, last=step)
                self.seconds = time.perf_counter() - began

        if background:
            self.pending = in_background(complete)
        else:
            complete()
            self.barrier()

    def wait(self) -> None:
        """Until the save in the background is complete on this rank; raises what it raised."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def in_background(work: Callable[[], None]) -> Future[None]:
    """Runs `work` in a thread of its own; unlike an executor's, it does not keep a failed process alive."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def load(path: Path, read: Callable[[Path], object], *, rank: int) -> dict[str, Any]:
    """Fills what the layout's `read` fills, and the random states, from a valid checkpoint; returns state.json."""
    read(path)
    rng = path / f"rng-{rank}.safetensors"
    if rng.exists():
        set_rng_state(load_file(rng))
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def latest(folder: RunFolder, say: Say = print) -> Path | None:
    """The newest valid checkpoint; broken ones are named and passed over."""
    for path in reversed(all_of(folder)):
        problem = check(path)
        if problem is None:
            return path
        say(f"{path.name} is not resumed from: {problem}")
    return None


def all_of(folder: RunFolder) -> list[Path]:
    """Folders named step-N, by N; valid or not."""
    found = [p for p in folder.checkpoints.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def check(path: Path) -> str | None:
    """None when every file of the manifest is there with its size and hash; else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        entries = [(str(name), int(size), str(digest)) for name, (size, digest) in manifest.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        return "it has no readable manifest, so it was not written to its end"
    for name, size, digest in entries:
        file = path / name
        if not file.exists() or file.stat().st_size != size:
            return f"{name} is missing or has another size than in the manifest"
        if _digest(file) != digest:
            return f"{name} has another content than in the manifest"
    return None


def prune(
    folder: RunFolder, keep: int, keep_best: bool = False, also: int | None = None, last: int | None = None
) -> None:
    """Removes all but the newest `keep`, that of step `also` and, if wanted, the one with the lowest held-out loss; and what an
    interrupted save left. A folder of a step after `last`, the one just saved, is one that the run was not resumed from because it
    is broken: counted among the newest, it would push out the only valid one."""
    there = [path for path in all_of(folder) if last is None or step_of(path) <= last]
    best = min(filter(None, map(_held_out, there)), default=None) if keep_best else None
    kept = there[-keep:] + ([best[1]] if best else [])
    for path in all_of(folder):
        if path not in kept and step_of(path) != also:
            shutil.rmtree(path)
    for path in folder.checkpoints.glob(".step-*.writing"):
        shutil.rmtree(path, ignore_errors=True)


def _held_out(path: Path) -> tuple[float, Path] | None:
    try:
        loss = json.loads((path / "state.json").read_text(encoding="utf-8")).get("held_out_loss")
    except (OSError, ValueError):
        return None
    return None if loss is None else (float(loss), path)


def rng_state() -> dict[str, torch.Tensor]:
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.array([*keys, position, has_gauss], dtype=np.int64)),
        "numpy_gauss": torch.tensor(float(cached), dtype=torch.float64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    version, *internal = state["python"].tolist()
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(internal), None if gauss != gauss else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _seal(path: Path) -> None:
    """Syncs every file, then writes the manifest and syncs it and the folder."""
    manifest = {}
    for file in sorted(path.iterdir()):
        _sync(file)
        manifest[file.name] = [file.stat().st_size, _digest(file)]
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(path / MANIFEST)
    _sync(path)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
