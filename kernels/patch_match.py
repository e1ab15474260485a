"""Which modules the layer may take over: a forward is recognized by its own source, not by the name of its class.

A class is known when the text of its forward, and of the functions that the forward leans on (rotary embedding, a
norm's helper), hashes to an entry of the table below. The replacements in `patch_layers` and `patch_loss` were written
from exactly those texts, so a copy of Llama under another name is taken, and a forward that a new release of
transformers changed is not: it keeps running as it is and the report says so. Comments, docstrings, annotations and
spacing do not count.

Leaves out what a module holds (adapters, quantized weights, dropout): `patch_linear` looks at that on every call.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .patch_table import KNOWN

AnyModule = Any  # an nn.Module whose attributes are read by name: their types are the model's affair

# Functions whose text belongs to a forward's: what they compute differs between families under one name.
_HELPERS = ("apply_rotary_pos_emb", "rotate_half")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm. eps is read from the module on each call, under the name `eps_name`."""

    casting: Literal["llama", "gemma"]
    offset: float
    eps_name: str


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention with rotary positions; what differs between families."""

    packed_qkv: bool = False
    qk_norm: bool = False
    sliding_window: Literal["none", "module", "config"] = "none"
    softcap: bool = False
    optional_rope: bool = False


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Gated MLP. `packed`: gate and up are halves of one product."""

    packed: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """Decoder layer. `sandwich`: a norm after attention and MLP too, before the residual is added (Gemma 2 and 3)."""

    sandwich: bool = False
    dropout: bool = False


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Base model, head, loss. What befalls the logits before the softmax; `router`: a balancing loss of experts."""

    softcap: bool = False
    scale: Literal["none", "multiply", "divide"] = "none"
    router: bool = False


Pattern = Norm | Attention | Mlp | Block | CausalLM

PATTERNS: dict[str, Pattern] = {
    "rms_norm": Norm(casting="llama", offset=0.0, eps_name="variance_epsilon"),
    "rms_norm_late_cast": Norm(casting="gemma", offset=0.0, eps_name="variance_epsilon"),
    "rms_norm_plus_one": Norm(casting="gemma", offset=1.0, eps_name="eps"),
    "attention": Attention(),
    "attention_config_window": Attention(sliding_window="config"),
    "attention_module_window": Attention(sliding_window="module"),
    "attention_qk_norm": Attention(sliding_window="module", qk_norm=True),
    "attention_softcap": Attention(sliding_window="module", softcap=True),
    "attention_optional_rope": Attention(sliding_window="module", optional_rope=True),
    "attention_packed": Attention(sliding_window="config", packed_qkv=True),
    "mlp": Mlp(),
    "mlp_packed": Mlp(packed=True),
    "block": Block(),
    "block_sandwich": Block(sandwich=True),
    "block_dropout": Block(dropout=True),
    "causal_lm": CausalLM(),
    "causal_lm_softcap": CausalLM(softcap=True),
    "causal_lm_multiply": CausalLM(scale="multiply"),
    "causal_lm_divide": CausalLM(scale="divide"),
    "causal_lm_router": CausalLM(router=True),
}

_ROLES = {
    "Norm": "norm",
    "Experts": "experts",
    "Attention": "attention",
    "MLP": "mlp",
    "DecoderLayer": "block",
    "ForCausalLM": "causal_lm",
}


def role(module: AnyModule) -> str | None:
    """What the module is, going by its name ("norm", "attention", ...): only to say what was *not* taken."""
    name = type(module).__name__
    return next((found for suffix, found in _ROLES.items() if name.endswith(suffix)), None)


def pattern(module: AnyModule) -> Pattern | None:
    """The pattern that the module's class follows, or None."""
    cls: Any = type(module)
    found = KNOWN.get(fingerprint(cls))
    return PATTERNS[found] if found is not None else None


@functools.cache
def fingerprint(cls: Any) -> str:
    """Hash of the class's forward and what it leans on; "" when the source cannot be read."""
    forward = inspect.unwrap(cls.forward)
    try:
        parts = [_text(forward)]
        if "_norm" in forward.__code__.co_names:
            parts.append(_text(cls._norm))
        names, found = set(forward.__code__.co_names), forward.__globals__
        for helper in _HELPERS:
            if helper in names and callable(found.get(helper)):
                function = inspect.unwrap(found[helper])
                parts.append(_text(function))
                names |= set(function.__code__.co_names)
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _text(function: Callable) -> str:
    """The function's source without docstring, comments, annotations and decorators."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    arguments = [a.arg for a in (*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs)]
    lines = [ast.unparse(_Unannotated().visit(statement)) for statement in body]
    return "\n".join([", ".join(arguments), *lines])


class _Unannotated(ast.NodeTransformer):
    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


def activation_name(function: Callable) -> str | None:
    """ "silu", "gelu" or "gelu_tanh" if the activation computes that (judged by its values), else None."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    wanted = {
        "silu": nn.functional.silu(x),
        "gelu": nn.functional.gelu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
    }
    with torch.no_grad():
        given = function(x)
    # The exact and the tanh GELU differ by up to 4.7e-4, so 1e-9 tells them apart.
    return next((name for name, y in wanted.items() if torch.allclose(given, y, rtol=0, atol=1e-9)), None)


def loaded(module: str, name: str) -> Any:
    """The class `name` of a library module if something has imported it already; a model cannot hold one otherwise."""
    found = sys.modules.get(module)
    return getattr(found, name, None) if found is not None else None


if __name__ == "__main__":
    where, _, wanted = sys.argv[1].rpartition(".")
    print(fingerprint(getattr(importlib.import_module(where), wanted)))
