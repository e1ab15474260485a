"""Which tensors of the files make up a tensor of the model, where a checkpoint names or cuts them in another way.

Most mixtures of experts on the Hub hold their experts one by one; transformers 5 keeps those of a block in two parameters,
[experts, 2 x intermediate, hidden] and [experts, hidden, intermediate]. The rules are transformers' own (`conversion_mapping.py`,
which `from_pretrained` and PEFT ask): names change, a numbered list of tensors becomes a first dimension, and two such lists lie one
after the other in the second. A row of what comes of it is one expert, so a rank reads its own experts and no others.

Left out: reading (streaming.py), and any other conversion, which is refused with its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .layouts import LayoutError


@dataclass(frozen=True)
class Stacked:
    """`parts[p][e]` is the tensor of expert e that lies p-th in the second dimension."""

    parts: tuple[tuple[str, ...], ...]


Source = str | Stacked


def held(folder: Path) -> dict[str, str]:
    """Name of each tensor -> the file of `folder` that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file.name)
    return where


def sources(net: Any, folder: Path) -> dict[str, Source]:
    """Name of each tensor of `net` -> where its values are; tensors that no file has are not in it.

    `net` is a model of transformers as its class makes it, not yet wrapped, sharded or quantized. It is told which rules were used,
    as `from_pretrained` tells a model, so that what is saved later is named as these files are. Raises LayoutError for a rule that
    stacks no experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(net)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted = dict.fromkeys(net.state_dict(), True)
    out: dict[str, Source] = {}
    stacks: dict[str, dict[str, list[str]]] = {}
    for name in sorted(held(folder), key=dot_natural_key):
        place: dict[str, Any] = {"base_model_prefix": net.base_model_prefix, "meta_state_dict": wanted}
        target, pattern = rename_source_key(name, renamings, converters, **place)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], **place)
        if target not in wanted:
            continue
        if pattern is None:
            out[target] = name
        else:
            stacks.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, found in stacks.items():
        rule = next(rule for rule in converters if set(found) <= set(rule.source_patterns))
        out[target] = stacked(target, rule, found)
    net._weight_conversions = [rule for rule in rules if rule.was_used()]
    return out


def stacked(target: str, rule: Any, found: Mapping[str, list[str]]) -> Stacked:
    """The experts of `target` in the order in which `rule` puts them."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in rule.operations]
    several = len(rule.source_patterns) > 1
    if steps != [(MergeModulelist, 0), (Concatenate, 1)][: 2 if several else 1]:
        raise LayoutError(
            f"the checkpoint keeps {target} in another form ({', '.join(sorted(found))}), which is not read shard by shard; train it "
            "with --set strategy.parallel=ddp, or save it once with transformers' save_pretrained(save_original_format=False)."
        )
    parts = tuple(tuple(found.get(pattern, ())) for pattern in rule.source_patterns)
    if len({len(part) for part in parts}) > 1:
        counts = ", ".join(f"{len(found.get(p, ()))} of {p}" for p in rule.source_patterns)
        raise LayoutError(f"{target} is made of as many tensors of each kind, and the files hold {counts}.")
    return Stacked(parts)


def rows_of(source: Stacked, shape: torch.Size, start: int, count: int, read: Any) -> torch.Tensor:
    """Experts start to start + count, [count, *shape[1:]], in the files' dtype. `read(name)` gives one whole tensor of a file.

    Raises LayoutError when the files hold other experts than `shape` says.
    """
    if len(source.parts[0]) != shape[0]:
        raise LayoutError(f"the files hold {len(source.parts[0])} experts, and config.json says {shape[0]}.")
    out: torch.Tensor | None = None
    for i in range(count):
        at = 0
        for part in source.parts:
            found = read(part[start + i])
            out = found.new_empty(count, *shape[1:]) if out is None else out
            if found.shape[1:] != shape[2:] or at + len(found) > shape[1]:
                raise LayoutError(f"{part[start + i]} is {list(found.shape)}, and does not fit into {list(shape[1:])}.")
            out[i, at : at + len(found)].copy_(found)
            at += len(found)
        if at != shape[1]:
            raise LayoutError(f"{source.parts[0][start + i]} and what lies beside it are {at} rows of {shape[1]}.")
    assert out is not None
    return out


def as_saved(net: Any, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of the model as the tensors of the files that it came from: `sources` the other way round, by transformers' rules."""
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(net, {name: tensor}).items()
