"""Every family of the table under every way of sharding: what two ranks compute is what one computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher.model_families import FAMILIES

from .conftest import Run
from .experts import save

pytestmark = pytest.mark.slow
LOSS, NORM = 1e-5, 1e-4  # relative; fp32, sums in another order, 16 kinds of layers
METHODS: dict[str, Any] = {"full": {"method": "full"}, "qlora": {"method": "qlora", "lora": {"r": 2}}}
LAYOUTS = ("fsdp2", "zero3")
CELLS = [(family, layout, method) for family in FAMILIES for layout in LAYOUTS for method in METHODS]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_cells: Run
) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("families")
    models = {family: str(save(folder / family, family, tiny_model)) for family in FAMILIES}

    def cell(family: str, parallel: str, method: str) -> dict[str, Any]:
        return {"model": models[family], "strategy": {**METHODS[method], "parallel": parallel}, "steps": [0, 1]}

    one = {f"{family} none {method}": cell(family, "none", method) for family in FAMILIES for method in METHODS}
    two = {" ".join(names): cell(*names) for names in CELLS}
    return run_cells(
        folder / "runs", [{"world": 1, "name": "one", "cells": one}, {"world": 2, "name": "two", "cells": two}]
    )


@pytest.mark.parametrize(("family", "layout", "method"), CELLS)
def test_two_ranks_compute_what_one_does(
    found: dict[str, list[dict[str, Any]]], family: str, layout: str, method: str
) -> None:
    one, two = found[f"{family} none {method}"][0], found[f"{family} {layout} {method}"]
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], rel=LOSS)
        assert rank["norms"] == pytest.approx(one["norms"], rel=NORM)
