"""What stops a run at its start: a GPU without the kernel layer, and ranks with different launch settings of the kernels."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from trebuchet.kernels.launch_table import launch_table_hash
from trebuchet.kernels.patch import patch
from trebuchet.launcher import api
from trebuchet.launcher.errors import JobFailed
from trebuchet.training.runtime import Runtime

RANK = """
import os, sys
from pathlib import Path
from accelerate import Accelerator
from trebuchet.kernels.launch_table import TABLE, launch_table_hash
from trebuchet.launcher.errors import JobFailed
from trebuchet.launcher.plan import Plan
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.training.runtime import Runtime
from trebuchet.training.session import Session

folder = RunFolder(Path(sys.argv[1]))
plan = Plan.model_validate_json(folder.plan.read_text(encoding="utf-8"))
session = Session(Runtime(plan, folder, Accelerator(cpu=True)))
session.report(session.prepared())  # with equal tables
if os.environ["RANK"] == sys.argv[2]:
    TABLE["rope"]["warps"] *= 2
print("table", launch_table_hash())
try:
    session.report(session.prepared())
except JobFailed as failure:
    print("refused", failure)
"""


def test_a_gpu_run_without_the_layer_fails_unless_it_was_switched_off(
    session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on, off = session(), session({"strategy.kernels": "off"})
    applied, none = on.prepared(), off.prepared()
    monkeypatch.setattr(Runtime, "device", torch.device("cuda"))  # the report reads its kind and computes nothing
    on.report(applied)
    off.report(none)
    stored = [json.loads(made.runtime.folder.record.read_text())["kernels"] for made in (on, off)]
    assert stored == [
        json.loads(json.dumps(applied.kernels.to_json())),
        {"applied": False, "reason": "strategy.kernels is off"},
    ]
    for lacking in (replace(applied, kernels=None), replace(applied, kernels=patch(applied.model, enable=False))):
        with pytest.raises(JobFailed, match=r"kernel layer was not applied.*--set strategy\.kernels=off"):
            on.report(lacking)


@pytest.mark.slow
def test_another_launch_table_on_one_rank_is_refused_on_all(
    tiny_config: Callable[..., dict[str, Any]], tmp_path: Any
) -> None:
    changes = {"cluster": {"name": "local", "processes": 2}, "strategy.parallel": "ddp", "tracking": []}
    folder, _ = api.begin(tiny_config(changes, output=str(tmp_path / "run")))
    folder.logs.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder.root), "1"],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    tables = [re.search(r"^table (\w+)$", text, re.MULTILINE)[1] for text in said]  # type: ignore[index]
    assert tables[0] == launch_table_hash() != tables[1], said
    for text in said:
        assert (
            f"refused the kernels' launch settings differ: table {tables[0]} on rank 0, {tables[1]} on rank 1." in text
        )
