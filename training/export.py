"""The folder that users load: the ecosystem's own files, written beside and then renamed.

full: config.json and model.safetensors in the dtype the base came in; lora and qlora: an adapter folder, which
`AutoModelForCausalLM.from_pretrained` opens too (with PEFT installed). Tokenizer, template and the base's licence come along.
Left out: merging.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..launcher.plan import Plan
from ..launcher.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    folder: RunFolder, plan: Plan, base: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Writes RUN/model from the (unwrapped) model of rank 0 and returns it."""
    beside = folder.root / ".model.writing"
    shutil.rmtree(beside, ignore_errors=True)
    assert plan.chosen is not None
    net: Any = model
    if plan.chosen.method == "full":
        dtype = DTYPES[plan.model.dtype]
        state = cast(net, dtype)
        net.config.use_cache = True  # switched off for training only
        net.config.dtype = dtype
        net.save_pretrained(beside, state_dict=state, safe_serialization=True)
        net.config.use_cache = False
    else:
        # The adapter's card and config name the base; a user without that local folder needs the Hub id, not a cache path.
        net.peft_config["default"].base_model_name_or_path = plan.config.model.name
        net.save_pretrained(beside, safe_serialization=True)
    tokenizer.save_pretrained(beside)
    for licence in sorted(base.glob("LICENSE*")):
        shutil.copy(licence, beside / licence.name)
    for file in beside.iterdir():
        readable(file)
    if folder.model.exists():
        shutil.rmtree(folder.model)
    os.replace(beside, folder.model)
    return folder.model


def cast(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict in `dtype`, with tensors that share their memory still sharing it: a tied head cast on its own would be saved
    a second time."""
    seen: dict[int, torch.Tensor] = {}
    return {name: seen.setdefault(t.data_ptr(), t.detach().to(dtype)) for name, t in net.state_dict().items()}


def readable(file: Path) -> None:
    """safetensors writes for the owner alone; a model is for whoever may see the run."""
    file.chmod(0o666 & ~umask())


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    now = os.umask(0o022)
    os.umask(now)
    return now
