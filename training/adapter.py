"""An adapter folder opened onto a model without weights: every tensor at its place, or a sentence that says what is wrong with it.

A loaded file is never executed: safetensors, or with the user's word a `.bin` read with torch's weights-only loader.
Left out: what the tensors mean; that is PEFT's.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..launcher.errors import RunError

SAFE, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def refuse_changed(folder: Path, recorded: Mapping[str, str] | None) -> None:
    """RunError when a file is not what the run wrote. Runs of before the record held digests are taken as they are."""
    now = digests(folder) if recorded else {}
    changed = sorted(name for name, digest in (recorded or {}).items() if now.get(name) != digest)
    if changed:
        raise RunError(
            f"{folder / changed[0]} is not what the run wrote: it is missing or its SHA-256 is another than the one in run.json. "
            "Take the adapter of a checkpoint or a copy, or pass --changed if you changed it yourself."
        )


def tensors_of(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of an adapter folder in fp32, finite. Raises RunError for a damaged file, and for a pickle unless allowed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / SAFE).exists():
        try:
            found = load_file(folder / SAFE)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{folder / SAFE} is damaged: {error}.") from None
    elif (folder / PICKLED).exists():
        if not allow_pickle:
            raise RunError(
                f"{folder / PICKLED} is a pickle, which can run code when it is opened. Where you trust it, pass --allow-pickle: it is "
                "then read by torch's weights-only loader."
            )
        found = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    else:
        raise RunError(f"{folder} has no {SAFE}.")
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"the adapter in {folder} is damaged: {name} holds values that are not finite.")
    return {name: tensor.float() for name, tensor in found.items()}


def wrap(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> Any:
    """`model` (parameters on meta) with PEFT's layers around it and the adapter's tensors in them; the base stays without weights.

    Raises RunError when names or shapes are not those that the folder's adapter_config.json asks for.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder} has no readable adapter_config.json: {str(error).splitlines()[0]}") from None
    if not isinstance(config, LoraConfig):
        raise RunError(f"{folder} holds a {config.peft_type} adapter; LoRA, rsLoRA and DoRA can be merged.")
    config.inference_mode = True
    config.init_lora_weights = True  # every value comes from the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings: whether they stay tied is looked at when merging
        wrapped: Any = get_peft_model(model, config)
        state = wrapped.state_dict(keep_vars=True)
        wanted = get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
    copies = {
        name for name in tensors if name.endswith(".base_layer.weight")
    }  # PEFT saves adapted embeddings whole too
    differing = sorted(wanted.keys() ^ (tensors.keys() - copies))
    if differing:
        raise RunError(
            f"the adapter in {folder} is damaged or of another model: {len(differing)} tensors are missing or too many, first "
            f"{differing[0]}."
        )
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # several when PEFT ties a trained embedding to its head
    for owner in wrapped.modules():
        for key, parameter in owner._parameters.items():
            places.setdefault(id(parameter), []).append((owner, key))
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{list(tensors[name].shape)} where {list(parameter.shape)} belongs"
            raise RunError(f"the adapter in {folder} is damaged or of another model: {name} is {shapes}.")
        for owner, key in places[id(parameter)]:
            owner._parameters[key] = nn.Parameter(tensors[name], requires_grad=False)
    return wrapped.eval()
