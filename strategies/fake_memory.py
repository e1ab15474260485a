"""Memory of one training step without the memory: run it on fake tensors and add up their storages.

Forward, backward and optimizer of the real model code run under torch's FakeTensorMode, where tensors have shapes,
dtypes and storages but no data, and every storage that comes into being is counted until it dies. What comes out is
what an allocator without rounding, caching or fragmentation would hold; kernels' own scratch space (cuBLAS workspaces,
NCCL buffers) is not seen. An 8B model takes seconds and about 1 GiB of host memory.

Leaves out what ranks exchange: one process, no sharding. Knows nothing of kernels: hand it a model that was patched, or
not. Quantized weights: see `fake_nf4`.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes. Peaks and `kept_by_forward` are above the weights (parameters and buffers)."""

    weights_bytes: int
    kept_by_forward_bytes: int  # alive when the forward pass ends: activations, and what the loss keeps
    forward_peak_bytes: int
    backward_peak_bytes: int
    optimizer_peak_bytes: int  # of the first step: gradients, fresh states, and the step's own temporaries
    gradients_bytes: int
    optimizer_state_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_peak_bytes, self.backward_peak_bytes, self.optimizer_peak_bytes)


# Ops of the kernel layer that make tensors of their own on the way: their bodies run, so that those are seen. The others
# are single kernels, and their fake results are all they make.
COMPOSED = frozenset(f"trebuchet::{name}" for name in ("lora_project", "lora_mlp", "token_loss", "token_loss_backward"))


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make while it is entered, each until it is freed.

    Enter it inside a FakeTensorMode. `live_bytes` is now, `peak_bytes` the most since the start or the last
    `restart_peak`. Distributed tensors are let through to their local parts, and a storage that is resized in place, as
    FSDP2 does to give a gathered parameter back, is counted with its new size. Tensors of another fake world, in which
    DTensor works out global shapes, are not memory and are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._seen: dict[int, int] = {}
        self._depth = 0
        self._mode: FakeTensorMode | None = None

    def __enter__(self) -> "StorageTracker":
        if self._depth == 0:
            mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
            assert isinstance(mode, FakeTensorMode), "enter the tracker inside a FakeTensorMode"
            self._mode, self._resize = mode, torch.UntypedStorage.resize_
            torch.UntypedStorage.resize_ = self._resized  # type: ignore[method-assign]
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func._schema.name
        if name in COMPOSED:
            with self, torch.no_grad():
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.fake_mode is self._mode:
                self._count(leaf)
        return result

    @property
    def _resized(self) -> Callable[..., Any]:
        tracker = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = tracker._resize(storage, size)
            known = tracker._seen.get(storage._cdata)
            if known is not None:
                tracker._seen[storage._cdata] = size
                tracker.live_bytes += size - known
                tracker.peak_bytes = max(tracker.peak_bytes, tracker.live_bytes)
            return result

        return resize_

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._seen.get(key)
        if known is None:
            weakref.finalize(storage, self._freed, key)
        if known != size:  # new, or resized
            self._seen[key] = size
            self.live_bytes += size - (known or 0)
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, key: int) -> None:
        self.live_bytes -= self._seen.pop(key, 0)

    def restart_peak(self) -> None:
        self.peak_bytes = self.live_bytes


def step_memory(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module], Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    *,
    device: str = "cpu",
) -> StepMemory:
    """Memory of the first step. `build` runs with the meta device as default and returns the model, adapted and in its
    dtypes.

    `loss(model)` makes its batch inside and returns the scalar; it runs in the fake world, so nothing in it may depend
    on values. `optimizer(trainable parameters)` defaults to AdamW as torch makes it on a GPU (foreach). Raises what the
    model code raises when it looks at a value.
    """
    with torch.device("meta"):
        model = build()
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=False), tracker, torch.device(device):
        materialize(model, device)
        weights = tracker.live_bytes
        tracker.restart_peak()
        value = loss(model)
        kept, forward = tracker.live_bytes - weights, tracker.peak_bytes - weights
        tracker.restart_peak()
        value.backward()
        del value
        backward = tracker.peak_bytes - weights
        trainable = [p for p in model.parameters() if p.requires_grad]
        gradients = tracker.live_bytes - weights
        tracker.restart_peak()
        made = torch.optim.AdamW(trainable, foreach=True) if optimizer is None else optimizer(trainable)
        made.step()
        stepped = tracker.peak_bytes - weights
        states = tracker.live_bytes - weights - gradients
    return StepMemory(
        weights_bytes=weights,
        kept_by_forward_bytes=kept,
        forward_peak_bytes=forward,
        backward_peak_bytes=backward,
        optimizer_peak_bytes=stepped,
        gradients_bytes=gradients,
        optimizer_state_bytes=states,
    )


def materialize(model: nn.Module, device: str) -> None:
    """Replace every parameter and buffer by an empty tensor of its shape, dtype and strides; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _empty_like(tensor, device)
                slots[name] = made[id(tensor)]  # type: ignore[assignment]
        state = getattr(module, "quant_state", None)
        if state is not None:
            _materialize_scales(state, device)
            module.weight.quant_state = state  # type: ignore[union-attr]  # where bitsandbytes' forward looks first


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    """Of a sharded parameter only the local part becomes memory."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    empty = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device=device)
    if isinstance(tensor, DTensor):
        empty = DTensor(empty, tensor._spec, requires_grad=tensor.requires_grad)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def fake_nf4(model: nn.Module, *, skip: Sequence[str] = ("lm_head",)) -> None:
    """Make each dense linear layer of a model on the meta device a bitsandbytes NF4 layer with double quantization.

    In place, before adapters are added; as `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)`
    would leave it, computing in the dtype of the weights. `skip`: names of layers to leave, wherever they are.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or name in skip:
                continue
            w = child.weight
            blocks = -(-w.numel() // 64)
            empty = partial(torch.empty, device="meta", dtype=torch.float32)
            inner = QuantState(empty(-(-blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
            scales, codes = empty(blocks, dtype=torch.uint8), empty(16)
            state = QuantState(scales, w.shape, codes, 64, "nf4", w.dtype, offset=empty(()), state2=inner)
            with torch.device("meta"):
                layer = Linear4bit(
                    w.shape[1], w.shape[0], bias=child.bias is not None, compute_dtype=w.dtype, quant_type="nf4"
                )
            layer.weight = Params4bit(
                empty(w.numel() // 2, 1, dtype=torch.uint8), requires_grad=False, quant_state=state, quant_type="nf4",
                bnb_quantized=True, module=layer,
            )  # fmt: skip
            layer.bias, layer.quant_state, layer.support_avx512bf16_for_cpu = child.bias, state, False
            setattr(parent, name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks for it


def _materialize_scales(state: Any, device: str) -> None:
    for part in (state, state.state2):
        for name in ("absmax", "code", "offset"):
            tensor = getattr(part, name, None)
            if tensor is not None:
                setattr(part, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
