"""What tests of merging compare: logits in float64, of folders and of PEFT's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 43).view(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(IDS).logits


def by_peft(base: Any, adapter: Path) -> Any:
    """PEFT's merge in float64."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base.double(), str(adapter)).double().merge_and_unload()


def opened(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
