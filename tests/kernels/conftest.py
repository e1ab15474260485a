"""Triton kernels run in Triton's interpreter here: the switch must be set before triton is first imported."""

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton was imported without its interpreter; run tests/kernels first or by itself")
os.environ["TRITON_INTERPRET"] = "1"

import trebuchet.kernels.triton_kernels.adamw8bit
import trebuchet.kernels.triton_kernels.glu
import trebuchet.kernels.triton_kernels.layer_norm
import trebuchet.kernels.triton_kernels.loss
import trebuchet.kernels.triton_kernels.nf4
import trebuchet.kernels.triton_kernels.rms_norm
import trebuchet.kernels.triton_kernels.rope
import trebuchet.kernels.triton_kernels.wide_norm  # noqa: F401

# The kernels above are bound to the interpreter now. Processes that other folders' tests start must not inherit the
# switch.
del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
