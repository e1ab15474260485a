"""`trebuchet merge`: the adapter into its base, in fp32, one module at a time, and proof that the result is the same model.

Which base: `quantized`, the NF4 weights that a QLoRA adapter was trained on, dequantized; or `original`, the weights before
quantization, which the adapter never saw. The arithmetic of LoRA, rsLoRA and DoRA is PEFT's own `merge`; memory is one shard being
written plus the adapter, whatever the model's size. Written beside and renamed: a refused merge leaves nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..launcher import record
from ..launcher.errors import JobFailed, RunError
from . import adapter as adapters
from . import proof
from .card import write_card
from .export import DTYPES, readable
from .finished import Finished
from .streamed import (
    ShardWriter,
    Weights,
    empty,
    fill,
    fill_buffers,
    plain_name,
    quantized_names,
    skeleton,
    through_nf4,
    units,
)

Base = Literal["quantized", "original"]
SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Options:
    base: Base | None = None  # None: what the adapter was trained on
    dtype: str | None = None  # None: that of the base
    tolerance: float | None = None  # None: rounding in that dtype
    changed: bool = False  # the adapter is not what the run wrote, and that is meant
    allow_pickle: bool = False
    shard_bytes: int = SHARD_BYTES


def merge(run: Finished, output: Path, options: Options) -> dict[str, Any]:
    """Writes `output`, a Hugging Face folder, and returns what stands in the record under `merge`."""
    job = _Merge(run, options)
    if output.exists():
        raise RunError(f"{output} exists; remove it, or name another folder with --output.")
    beside = output.with_name(f".{output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        untied, unread = job.write(beside)
        job.settings(beside, untied=untied)
        found = job.prove(beside)
        facts: dict[str, Any] = {
            "folder": str(output),
            "base": job.base,
            "dtype": job.dtype,
            "tolerance": job.tolerance,
            "untied": untied,
            "unread": unread,
            **found,
            "files": adapters.digests(beside),
            "adapter_files": adapters.digests(run.folder.model),
        }
        write_card(beside, run, merge=facts)
        for file in beside.iterdir():
            readable(file)
        os.replace(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    record.update(run.folder, merge=facts)
    return facts


class _Merge:
    def __init__(self, run: Finished, options: Options):
        self.run, self.chosen = run, run.chosen
        if self.chosen.method == "full":
            raise RunError(f"{run.folder.root} trained all weights: {run.folder.model} is the whole model already.")
        if run.plan.config.objective.name == "reward":
            raise RunError(
                f"{run.folder.root} is a reward model: its adapter comes with a score head, which a merge does not write. Open "
                f"{run.folder.model} with PEFT, or train all weights (strategy.method=full) for one whole model."
            )
        trained_on: Base = "quantized" if self.chosen.method == "qlora" else "original"
        self.base: Base = options.base or trained_on
        if self.base == "quantized" and trained_on == "original":
            raise RunError("this adapter was trained on weights that were not quantized; merge with --base original.")
        if not options.changed:
            adapters.refuse_changed(run.folder.model, run.record.get("model_files"))
        self.tensors = adapters.tensors_of(run.folder.model, allow_pickle=options.allow_pickle)
        self.dtype = options.dtype or run.plan.model.dtype
        self.tolerance = proof.TOLERANCE[self.dtype] if options.tolerance is None else options.tolerance
        self.shard_bytes = options.shard_bytes
        self.weights = Weights(run.base, self.skeleton())
        self.quantized = quantized_names(self.skeleton()) if trained_on == "quantized" else set()

    def skeleton(self) -> Any:
        return skeleton(self.run.base, trust_remote_code=self.run.plan.config.model.trust_remote_code)

    @cached_property
    def storage(self) -> torch.dtype:
        """The dtype that the frozen base had in training."""
        from ..strategies.prepare import storage_dtype

        return storage_dtype(self.chosen)

    def fetch(self, name: str) -> Tensor:
        """A weight of the base that is merged into, in fp32."""
        return self.trained_on(name) if self.base == "quantized" else self.weights.get(name)

    def trained_on(self, name: str) -> Tensor:
        """A weight as the forward pass of training had it, in fp32."""
        weight = self.weights.get(name)
        if name in self.quantized:
            return through_nf4(weight, self.storage, double=self.run.plan.config.strategy.quant.double)
        return weight.to(self.storage).float()

    def write(self, folder: Path) -> tuple[bool, list[str]]:
        """Merged shards into `folder`; (whether embedding and head were tied and are not any more, names in the base's files that
        the model does not have)."""
        wrapped = adapters.wrap(self.skeleton(), self.run.folder.model, self.tensors)
        writer = ShardWriter(folder, self.shard_bytes)
        kept: dict[str, Tensor] = {}
        ends = self.weights.tied.keys() | set(self.weights.tied.values())
        for name, tensor in self.merged(wrapped):
            cast = tensor.to(DTYPES[self.dtype])
            if name in ends:
                kept[name] = cast
                continue
            for written, part in self.weights.as_saved(name, cast):
                writer.add(written, part)
        same = all(torch.equal(kept[a], kept[b]) for a, b in self.weights.tied.items() if a in kept and b in kept)
        for name, tensor in kept.items():
            if not (same and name in self.weights.tied):
                for written, part in self.weights.as_saved(name, tensor):
                    writer.add(written, part)
        writer.close()
        return bool(self.weights.tied) and not same, self.weights.unread

    def merged(self, wrapped: Any) -> Iterator[tuple[str, Tensor]]:
        """(name in the plain model, fp32 tensor), one module after the other."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        for name, unit in units(wrapped):
            held = fill(name, unit, self.fetch)
            if isinstance(unit, BaseTunerLayer):
                try:
                    merge_all(unit)
                except (ValueError, RuntimeError) as error:
                    raise JobFailed(f"{plain_name(name)} cannot be merged: {str(error).splitlines()[0]}") from None
                owner: Any = unit.get_base_layer()
            else:
                owner = unit.modules_to_save["default"] if isinstance(unit, ModulesToSaveWrapper) else unit
            for key, parameter in owner.named_parameters():
                if "." not in key or isinstance(unit, (BaseTunerLayer, ModulesToSaveWrapper)):
                    yield plain_name(f"{name}.{key}"), parameter.detach()
            empty(held)
        fill_buffers(wrapped, self.fetch)
        parameters = {n for n, _ in wrapped.named_parameters(remove_duplicate=False)}
        for name in wrapped.state_dict().keys() - parameters:
            yield plain_name(name), wrapped.get_buffer(name)

    def settings(self, folder: Path, *, untied: bool) -> None:
        """Config, generation settings, tokenizer and licence beside the weights."""
        from transformers import AutoConfig

        trust = self.run.plan.config.model.trust_remote_code
        config = AutoConfig.from_pretrained(self.run.base, local_files_only=True, trust_remote_code=trust)
        config.dtype = DTYPES[self.dtype]
        config.architectures = [type(self.skeleton()).__name__]
        if untied:
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
        self.run.copy_beside(folder)

    def prove(self, folder: Path) -> dict[str, Any]:
        """Logits of base and adapter, by PEFT's forward, against those of the files just written."""
        prompts = self.run.prompts(proof.PROMPTS)
        ids, mask = proof.batch_of(prompts, self.run.pad_id)
        wrapped = adapters.wrap(self.skeleton(), self.run.folder.model, self.tensors)
        reference = proof.logits_of(wrapped, self.fetch, ids, mask)
        net = skeleton(folder, trust_remote_code=self.run.plan.config.model.trust_remote_code)
        written = proof.logits_of(net, Weights(folder, net).get, ids, mask)
        found = proof.compare(reference, written, len(ids))
        proof.require(found, self.tolerance, "the merged model")
        facts = {"difference": found.to_json(), "difference_from_trained": None}
        if self.chosen.method == "qlora" and self.base == "original":
            trained = proof.logits_of(wrapped, self.trained_on, ids, mask)
            facts["difference_from_trained"] = proof.compare(trained, written, len(ids)).to_json()
        return facts


def merge_all(layer: Any) -> None:
    """Every adapter around one layer: experts have one in another, for each of their two parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(layer, BaseTunerLayer):
        layer.merge(safe_merge=True)
        layer = layer.base_layer  # type: ignore[attr-defined]  # every layer of PEFT has one
