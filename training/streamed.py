"""A model's weights read one module at a time, so that a model larger than the memory can still be computed with.

The model is built without weights; what a module needs is read from the safetensors files right before it is used and let go after,
and what is written has the names of the files. Where they hold experts one by one, those of a block are one tensor of the model, which
is the largest that memory holds. All arithmetic is fp32. Left out: speed (a forward pass reads the files once), and files that arrange
the model in another way yet (strategies/checkpoint_names.py), which are refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..launcher.errors import ModelError
from ..strategies import checkpoint_names
from ..strategies.checkpoint_names import rows_of
from ..strategies.layouts import LayoutError

Fetch = Callable[[str], Tensor]


class Weights:
    """The tensors of a folder of safetensors files, by the names that the model gives them, in fp32.

    `model` is the folder's as its class makes it (`skeleton`). Raises ModelError when the files are damaged or arrange it in a way that
    is not read tensor by tensor.
    """

    def __init__(self, folder: Path, model: Any):
        self.folder, self.model = folder, model
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _open(file).keys()}  # noqa: SIM118  (not a mapping)
        try:
            self.sources = checkpoint_names.sources(model, folder)
        except LayoutError as error:
            raise ModelError(str(error)) from None
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.handle: tuple[Path, Any] | None = None
        self.read: set[str] = set()

    def get(self, name: str) -> Tensor:
        """fp32, memory of its own. Raises ModelError when no file has the tensor."""
        source = self.sources.get(name) or self.sources.get(self.tied.get(name, name))
        if source is None:
            raise ModelError(f"the files in {self.folder} hold no tensor {name}, or have another name for it.")
        if isinstance(source, str):
            return self._one(source).to(torch.float32, copy=True)
        shape = self.shapes[name]
        try:
            return rows_of(source, shape, 0, shape[0], lambda one: self._one(one).float())
        except LayoutError as error:
            raise ModelError(f"{self.folder}: {error}") from None

    def _one(self, name: str) -> Tensor:
        file = self.files[name]
        if self.handle is None or self.handle[0] != file:
            self.handle = (file, _open(file))
        self.read.add(name)
        return self.handle[1].get_tensor(name)

    def as_saved(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor of the model as the files have it: of stacked experts, one by one where they are."""
        for written, part in checkpoint_names.as_saved(self.model, name, tensor):
            yield written, part if part.untyped_storage().nbytes() == part.nbytes else part.clone()

    @property
    def unread(self) -> list[str]:
        """Tensors of the files that nothing asked for."""
        return sorted(self.files.keys() - self.read)


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged: {error}.") from None


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder's config.json without weights (parameters on the meta device, buffers real), ready to evaluate."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the weights in {folder} are stored quantized; take the folder with the weights that they were made from."
        )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def quantized_names(model: Any) -> set[str]:
    """Names of the weights that loading in 4 bit quantizes: transformers' own choice, asked of a copy of the skeleton."""
    from copy import deepcopy

    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    copy = deepcopy(model)
    replaced = replace_with_bnb_linear(
        copy,
        modules_to_not_convert=get_keys_to_not_convert(copy),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    return {f"{name}.weight" for name, module in replaced.named_modules() if type(module).__name__ == "Linear4bit"}


def through_nf4(weight: Tensor, dtype: torch.dtype, *, double: bool) -> Tensor:
    """fp32 weight -> what an NF4 layer of a model loaded in `dtype` multiplies with, in fp32 again."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed, state = quantize_4bit(weight.to(device, dtype), quant_type="nf4", compress_statistics=double)
    return dequantize_4bit(packed, state).to("cpu", torch.float32)


def plain_name(name: str) -> str:
    """The name that a parameter has without PEFT's wrappers around it."""
    name = name.removeprefix("base_model.model.").removesuffix(".default")
    for part in (".base_layer", ".modules_to_save.default", ".original_module"):
        name = name.replace(part, "")
    return name


def units(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that are filled and emptied as one: an adapted layer with everything in it, else each owner of parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        yield prefix, model
        return
    if model._parameters:
        yield prefix, model
    for name, child in model.named_children():
        yield from units(child, f"{prefix}.{name}" if prefix else name)


def fill(name: str, module: nn.Module, fetch: Fetch) -> list[tuple[nn.Module, str, Any]]:
    """Real weights where the module has none; returns what to put back."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    emptied: list[tuple[nn.Module, str, Any]] = []
    owners = [(name, module)]
    if _is_adapted(module):
        skip = "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else None
        owners = [(f"{name}.{n}" if n else name, m) for n, m in module.named_modules() if skip is None or skip not in n]
    for owner_name, owner in owners:
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                emptied.append((owner, key, parameter))
                owner._parameters[key] = nn.Parameter(fetch(plain_name(f"{owner_name}.{key}")), requires_grad=False)
    return emptied


def empty(emptied: list[tuple[nn.Module, str, Any]]) -> None:
    for owner, key, parameter in emptied:
        owner._parameters[key] = parameter


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


@contextlib.contextmanager
def streaming(model: nn.Module, fetch: Fetch) -> Iterator[None]:
    """While this lasts, calling `model` reads each module's weights by `fetch` before its forward and drops them after it."""
    fill_buffers(model, fetch)
    hooks = []
    for name, unit in units(model):
        held: list[tuple[nn.Module, str, Any]] = []

        def before(module: nn.Module, _: Any, name: str = name, held: list[Any] = held) -> None:
            held[:] = fill(name, module, fetch)

        def after(module: nn.Module, _: Any, output: Any, held: list[Any] = held) -> None:
            empty(held)
            held.clear()

        hooks += [unit.register_forward_pre_hook(before), unit.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fill_buffers(model: nn.Module, fetch: Fetch) -> None:
    """Buffers that belong to the weights; the others (rotary frequencies) are computed by the model itself."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict().keys() - parameters:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[key] = fetch(plain_name(name)).to(module._buffers[key].dtype)  # type: ignore[union-attr]


class ShardWriter:
    """safetensors files of at most `limit_bytes`, each written as soon as it is full, and the index that names them."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self.held: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self._held_bytes() + size > self.limit_bytes:
            self._flush()
        self.held[name] = tensor.contiguous()
        self.total_bytes += size

    def close(self) -> None:
        self._flush()
        count = len(self.shards)
        names = [
            f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for i in range(1, count + 1)
        ]
        for i, name in enumerate(names):
            (self.folder / f"part-{i}.safetensors").rename(self.folder / name)
        if count > 1:
            where = {tensor: name for name, tensors in zip(names, self.shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.held.values())

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self.held:
            save_file(self.held, self.folder / f"part-{len(self.shards)}.safetensors", metadata={"format": "pt"})
            self.shards.append(list(self.held))
            self.held = {}
