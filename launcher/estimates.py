"""`trebuchet estimate`: memory of many strategies from a file, a list in and a list out, in order; or of one from flags."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..strategies.memory import estimate
from ..strategies.memory_request import MemoryRequest, ModelDims
from .costing import dims
from .errors import UserError
from .model_spec import load_model_spec
from .schema import Model


def answer(source: str) -> str:
    """The JSON text for the requests in `source` (a path, or - for standard input). Raises UserError naming the entry."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        requests = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from None
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from None
    if not isinstance(requests, list):
        raise UserError(f"{source} must hold a list of requests, one object each.")
    results = []
    for i, request in enumerate(requests):
        try:
            results.append(estimate(MemoryRequest.from_dict(request)).to_json())
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source}: request {i}: {error}") from None
    return "[" + ",\n ".join(map(json.dumps, results)) + "]"  # json's own indentation takes three times as long


def of_flags(model: str, given: dict[str, Any]) -> str:
    """The JSON text, a list of one, for the settings `given` (names of a request) on a model found like that of a YAML."""
    spec = load_model_spec(Model(name=model))
    try:
        sizes = {field.name: getattr(dims(spec), field.name) for field in fields(ModelDims)}
        adapters = {"lora_r": 16, "lora_targets": "all-linear"} if given.get("method", "full") != "full" else {}
        request = MemoryRequest.from_dict({"model": sizes, **adapters, **given})
        return json.dumps([estimate(request).to_json()], indent=1)
    except (TypeError, ValueError) as error:
        raise UserError(f"estimate: {error}") from None
