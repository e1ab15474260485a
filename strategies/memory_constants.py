"""The constants of the memory arithmetic, read once from `memory_constants.json`.

The file holds for each constant its value, how it is known (derived, measured or fitted) and from what.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CONSTANTS: dict[str, Any] = {name: entry["value"] for name, entry in TABLE.items()}
