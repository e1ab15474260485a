"""`trebuchet estimate --json FILE`: memory of many strategies, a list in and a list out, in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..strategies.memory import estimate
from ..strategies.memory_request import MemoryRequest
from .errors import UserError


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
    return json.dumps(results, indent=1)
