"""The folder that users load: the ecosystem's own files, written beside and then renamed.

full: config.json and model.safetensors (several with an index when large) in the dtype that training computed in; lora and qlora: an
adapter folder, which `AutoModelForCausalLM.from_pretrained` opens too (with PEFT installed). Tokenizer, template and the base's
licence come along.
Left out: merging.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder
from ..strategies.checkpoint_names import as_saved
from ..strategies.layouts import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


SHARD_BYTES = 5 * 10**9  # of one file, as transformers writes them


def export(
    folder: RunFolder,
    plan: Plan,
    base: Path,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    main: bool,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes RUN/model and returns it, a whole model in files of at most `shard_bytes`. Every rank calls it; only `main` writes, the
    others hand over their shards."""
    beside = folder.root / ".model.writing"
    assert plan.chosen is not None
    if main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    net: Any = layout.inside
    if plan.chosen.method != "full":
        trained = {name for name, p in net.named_parameters() if p.requires_grad}
        adapters = {name: tensor.cpu() for name, tensor in layout.whole(trained.__contains__)}
        if main:
            # The adapter's card and config name the base; a user without that local folder needs the Hub id, not a cache path.
            net.peft_config["default"].base_model_name_or_path = plan.config.model.name
            net.save_pretrained(beside, state_dict=adapters, safe_serialization=True)
    elif layout.together:
        stream(layout, beside, written_dtype(plan), main=main, shard_bytes=shard_bytes)
    elif main:
        dtype = written_dtype(plan)
        state = cast(net, dtype)
        with as_loaded(net, dtype):
            net.save_pretrained(beside, state_dict=state, safe_serialization=True, max_shard_size=shard_bytes)
    if main:
        finish(beside, folder.model, base, tokenizer)
    return folder.model


def written_dtype(plan: Plan) -> torch.dtype:
    """That of the base where training computed in it too, else fp32: what was measured is what is written. Most updates of a short run
    are smaller than half a step between two numbers of bf16, and rounding takes them away: a SmolLM2-135M that was trained in fp32 on
    a CPU, from 3.815 to a held-out loss of 2.967, had 3.081 in the base's bf16."""
    assert plan.chosen is not None
    return DTYPES[plan.model.dtype] if plan.chosen.precision == f"{plan.model.dtype}-mixed" else torch.float32


def finish(beside: Path, final: Path, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(beside)
    for licence in sorted(base.glob("LICENSE*")):
        shutil.copy(licence, beside / licence.name)
    for file in beside.iterdir():
        readable(file)
    if final.exists():
        shutil.rmtree(final)
    os.replace(beside, final)


@contextlib.contextmanager
def as_loaded(net: Any, dtype: torch.dtype) -> Iterator[None]:
    """The config as users want it: the cache was switched off for training only."""
    net.config.use_cache, net.config.dtype = True, dtype
    yield
    net.config.use_cache = False


def stream(layout: Layout, beside: Path, dtype: torch.dtype, *, main: bool, shard_bytes: int) -> None:
    """A whole fine-tuned model as one Hugging Face folder, gathered tensor by tensor: rank 0 holds one file's worth at a time.

    Every rank calls it. Tied tensors are written once, under the name that the model loads; experts one by one where the files of the
    base held them so.
    """
    net: Any = layout.inside
    tied = set(getattr(net, "all_tied_weights_keys", None) or {})
    shape = lambda t: getattr(t, "ds_shape", t.shape)  # noqa: E731  ZeRO-3 leaves empty tensors behind
    empty = {n: torch.empty(shape(t), dtype=dtype, device="meta") for n, t in net.state_dict(keep_vars=True).items()}
    parts = {n: dict(as_saved(net, n, t)) for n, t in empty.items() if n not in tied}
    sizes = {written: t.numel() * dtype.itemsize for of_one in parts.values() for written, t in of_one.items()}
    files = deal(sizes, shard_bytes)
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    last = {group[-1]: (name, group) for name, group in zip(names, files, strict=True)}
    held: dict[str, torch.Tensor] = {}
    for name, tensor in layout.whole(parts.__contains__):
        for written, part in as_saved(net, name, tensor.to("cpu", dtype)) if main else ():
            held[written] = part.contiguous()
            if written in last:
                save_file(held, beside / last[written][0], metadata={"format": "pt"})
                held.clear()
    if not main:
        return
    if len(files) > 1:
        where = {name: file for file, group in zip(names, files, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with as_loaded(net, dtype):
        net.config.save_pretrained(beside)
    if net.can_generate():
        net.generation_config.save_pretrained(beside)


def deal(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into files of at most `limit` bytes; a tensor larger than that has a file of its own."""
    files: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


def cast(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict in `dtype`, with tensors that share their memory still sharing it: a tied head cast on its own would be saved
    a second time."""
    seen: dict[int, torch.Tensor] = {}
    return {name: seen.setdefault(t.data_ptr(), t.detach().to(dtype)) for name, t in net.state_dict().items()}


def readable(file: Path) -> None:
    """safetensors writes for the owner alone; a model is for whoever may see the run."""
    file.chmod(0o666 & ~umask())


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    now = os.umask(0o022)
    os.umask(now)
    return now
