"""What the functions of `functional` ask of their inputs: shapes, widths, and the dtype of a linear layer under autocast."""

import torch
from torch import Tensor


def as_linear(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple:
    """The inputs in the dtype in which torch.nn.Linear would multiply them: autocast's, else the weight's."""
    device = x.device.type
    dtype = x.dtype if weight is None else weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in (x, weight, bias))


def check_norm(op: str, x: Tensor, weight: Tensor, casting: str) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight {describe(weight)} must be as wide as x {describe(x)}")
    if casting not in ("llama", "gemma"):
        raise ValueError(f"{op}: casting is {casting!r}; it must be 'llama' or 'gemma'")


def describe(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
