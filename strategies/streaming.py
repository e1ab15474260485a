"""Loading for sharded layouts: a skeleton without memory, and its shards filled from the safetensors files row by row.

`skeleton` builds the model with its parameters on the meta device (buffers are real: those that no file holds, like rotary
frequencies, must be computed). After sharding, `fill` gives each rank's shards memory and reads only their rows; a 4-bit weight is
quantized on the way, piece by piece, so that no rank ever holds a whole matrix in 16 bit. Ranks exchange nothing but the absmax of
a matrix, whose mean double quantization needs. The result equals quantizing the whole matrix at once, bit for bit.

Left out: what files call their tensors and how they cut them (checkpoint_names.py), and what adapters start from (adapter_start.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from ..kernels.nf4_linear import BLOCK, BLOCK2, NF4Linear, raw
from .adapter_start import is_adapter, start_adapters
from .checkpoint_names import Source, Stacked, held, rows_of
from .layouts import LayoutError
from .shards import gathered, own_rows

if TYPE_CHECKING:
    from ..launcher.schema import Model

# Weights read and quantized at a time. On a CPU bitsandbytes compares each with all 16 levels in fp32: 64 bytes a weight, twice.
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}


def skeleton(folder: Path, model: Model, *, dtype: torch.dtype, attention: str, score: bool = False) -> Any:
    """The causal LM of a Hugging Face folder with parameters on meta, tied as its config says; with `score` its score model."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    options = {"trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    if score:
        config.num_labels = 1
    kind = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        net: Any = kind.from_config(config, dtype=dtype, attn_implementation=attention, **options)
    net.config.architectures = [type(net).__name__]
    net.tie_weights()
    if (folder / "generation_config.json").exists():
        net.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return net


def to_nf4(net: Any, *, double: bool, compute_dtype: torch.dtype) -> None:
    """Replaces every linear layer but the head (and what is tied to it) by an empty NF4Linear, in place."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = set(get_keys_to_not_convert(net))  # what transformers leaves alone when it quantizes with bitsandbytes
    for name, module in list(net.named_modules()):
        for child, linear in list(module.named_children()):
            path = f"{name}.{child}" if name else child
            if type(linear) is torch.nn.Linear and path not in kept:
                bias = None if linear.bias is None else linear.bias.data
                size = (linear.out_features, linear.in_features)
                dtype = linear.weight.dtype
                made = NF4Linear(*size, bias=bias, double=double, dtype=dtype, compute_dtype=compute_dtype)
                setattr(module, child, made)


def fill(
    net: Any,
    *,
    folder: Path,
    sources: Mapping[str, Source],
    made: Mapping[str, torch.Tensor],
    device: torch.device,
    offload: bool,
    seed: int,
) -> None:
    """Memory and values for every sharded parameter of `net` that is on meta. `net` is a causal LM, or PEFT's model around one.
    `sources`: what of the files each tensor is made of. `made`: tensors that no file has, by name.

    Collective. With `offload` parameters stay in host memory. Raises LayoutError when the files lack a tensor.
    """
    materialize(net, device, torch.device("cpu") if offload else device)
    core = net.get_base_model() if hasattr(net, "get_base_model") else net
    with torch.no_grad(), Weights(folder, sources, made) as weights:
        done: set[int] = set()
        for name, module in core.named_modules():
            if isinstance(module, NF4Linear):
                quantize(module, weights, hub_name(f"{name}.weight"), device)
                done |= {id(module.weight), id(module.absmax)}
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in done and not is_adapter(f"{name}.{key}"):
                    copy_rows(parameter, weights, hub_name(f"{name}.{key}"))
                    done.add(id(parameter))
        start_adapters(core, seed)


def copy_rows(parameter: torch.Tensor, weights: Weights, name: str) -> None:
    """This rank's rows of one tensor, a piece at a time: an embedding is a gigabyte."""
    rows, first = own_rows(parameter)
    step = max(1, piece_of(rows.device) // max(1, parameter.numel() // max(1, parameter.shape[0])))
    for at in range(0, len(rows), step):
        count = min(step, len(rows) - at)
        rows[at : at + count].copy_(weights.rows(name, parameter.shape, first + at, count))


def piece_of(device: torch.device) -> int:
    return PIECE.get(device.type, PIECE["cpu"])


def materialize(net: torch.nn.Module, device: torch.device, parameters: torch.device) -> None:
    """Memory, not yet values, for what is on meta; parameters that were one object still are."""
    owners = [(m, k, p) for m in net.modules() for k, p in m.named_parameters(recurse=False)]
    first: dict[int, tuple[torch.nn.Module, str]] = {}
    tied = [(m, k, first.setdefault(id(p), (m, k))) for m, k, p in owners]

    def move(tensor: torch.Tensor) -> torch.Tensor:
        where = parameters if isinstance(tensor, DTensor) else device
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor.to(where)

    net._apply(move)
    for module, key, (owner, name) in tied:
        if (module, key) != (owner, name):
            setattr(module, key, getattr(owner, name))


class Weights:
    """The safetensors files of a folder, opened when needed; reads rows, never a file. `made` holds tensors that no file has."""

    def __init__(self, folder: Path, sources: Mapping[str, Source], made: Mapping[str, torch.Tensor]):
        self.folder, self.sources, self.made = folder, sources, made
        self.files: dict[str, Any] = {}
        self.where: dict[str, str] = {}

    def __enter__(self) -> Weights:
        self.where = held(self.folder)
        return self

    def __exit__(self, *error: object) -> None:
        self.files.clear()

    def _slice(self, name: str) -> Any:
        file = self.where[name]
        if file not in self.files:
            self.files[file] = safe_open(self.folder / file, framework="pt")
        return self.files[file].get_slice(name)

    def rows(self, name: str, shape: torch.Size, start: int, count: int) -> torch.Tensor:
        """Rows start to start + count of the model's tensor `name`, in the file's dtype; its shape must be `shape`."""
        if name in self.made:
            return self.made[name][start : start + count]
        source = self.sources.get(name)
        if source is None:
            raise LayoutError(
                f"{self.folder} has no tensor {name}, so this model cannot be streamed onto shards; its checkpoint names its "
                f"tensors in another way ({', '.join(sorted(self.where)[:3])}, …). Train it with --set strategy.parallel=ddp."
            )
        if isinstance(source, Stacked):
            return rows_of(source, shape, start, count, lambda one: self._slice(one)[:])
        found = self._slice(source)
        if list(found.get_shape()) != list(shape):
            raise LayoutError(f"{name} in {self.folder} is {found.get_shape()}, and config.json says {list(shape)}.")
        return found[start : start + count]


def quantize(module: NF4Linear, weights: Weights, name: str, device: torch.device) -> None:
    """This rank's blocks of one NF4 layer from the rows that hold them; collective over the ranks that share the weight."""
    from bitsandbytes.functional import get_4bit_type, quantize_4bit, quantize_blockwise

    packed, first = own_rows(module.weight)
    shape = torch.Size((module.out_features, module.in_features))
    absmax = torch.empty(len(packed), dtype=torch.float32, device=device)
    blocks = piece_of(device) // BLOCK
    for at in range(0, len(packed), blocks):
        count = min(blocks, len(packed) - at)
        begin, end = (first + at) * BLOCK, (first + at + count) * BLOCK
        row = begin // module.in_features
        piece = weights.rows(name, shape, row, math.ceil(end / module.in_features) - row).to(device, module.dtype)
        piece = piece.flatten()[begin - row * module.in_features : end - row * module.in_features]
        bytes_, state = quantize_4bit(piece.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        packed[at : at + count].copy_(bytes_.view(count, -1))
        absmax[at : at + count].copy_(state.absmax)
    module.code.copy_(raw(get_4bit_type("nf4", device=device)))
    scales, _ = own_rows(module.absmax)
    if not module.nested:
        scales.copy_(raw(absmax).view(-1, 4))
        return
    everyone = gathered(absmax, module.weight)
    offset = everyone.mean()
    eight_bit, second = quantize_blockwise(everyone - offset, blocksize=BLOCK2)
    scales.copy_(eight_bit[first : first + len(packed)])
    for buffer, values in ((module.code2, second.code), (module.absmax2, second.absmax), (module.offset, offset)):
        buffer.copy_(raw(values.float()))


def hub_name(name: str) -> str:
    """The name of a tensor in the model before PEFT wrapped it: of a layer with adapters, of experts in several wrappers, and of a
    layer that is trained whole."""
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save.default."):
        while wrapper in name:
            name = name.replace(wrapper, ".")
    return name
