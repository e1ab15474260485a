"""`ModelSpec`: the sizes of one model, and where they come from: a folder, the Hugging Face cache, a table, the Hub.

Sizes only; no weight is read and nothing heavy imported, so that `plan` stays fast and works without a network.
Counting is in `model_layout.py`, families in `model_families.py`, files in `model_files.py`, a table in `models.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from . import model_files as files
from .errors import ModelError, did_you_mean, nearest
from .model_families import FAMILIES
from .model_layout import Layout, LinearLayer, layout
from .schema import Model

Targets = Literal["all-linear"] | tuple[str, ...]
Source = Literal["folder", "cache", "table", "hub"]
HUB_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions and exact counts of one decoder. `intermediate_size` is per expert in a mixture of experts.

    `params` counts each parameter once (a tied head is the embedding) and is the sum of `embedding_params` (with the
    head where it is untied), `linear_params` (the matrices of the blocks, experts included: what NF4 quantises) and
    `other_params` (norms, biases, routers). `dtype` is that of the checkpoint. `path` is the local folder that was
    read, `weights_bytes` the size of its safetensors, both None where there is none.
    """

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int | None = None
    experts_per_token: int | None = None
    max_position_embeddings: int
    params: int
    embedding_params: int
    linear_params: int
    other_params: int
    linears: tuple[LinearLayer, ...]
    dtype: Literal["bf16", "fp16", "fp32"]
    source: Source
    revision: str | None = None
    path: str | None = None
    weights_bytes: int | None = None

    @property
    def expert_params(self) -> int:
        """The part of `linear_params` that transformers 5 keeps in three-dimensional expert tensors, 0 for a dense
        model. bitsandbytes as transformers calls it quantises nn.Linear only and leaves these in 16 bits."""
        return sum(layer.params for layer in self.linears if layer.kind == "experts")

    def adapted(self, targets: Targets) -> tuple[LinearLayer, ...]:
        """The layers that PEFT gives an adapter. Raises ModelError for a target that no linear layer has."""
        head = LinearLayer(name="lm_head", in_features=self.hidden_size, out_features=self.vocab_size, count=1)
        if targets == "all-linear":
            return tuple(layer for layer in self.linears if layer.lora_rank)
        assert not isinstance(targets, str)
        layers = (*self.linears, head)
        for target in targets:
            answering = [layer for layer in layers if _answers(layer, target)]
            if answering and not any(layer.lora_rank for layer in answering):
                raise ModelError(f"lora.targets: '{target}' of {self.model_type} cannot have an adapter; leave it out")
            if not answering:
                known = {n for layer in layers for n in (layer.names or (layer.name.rsplit(".", 1)[-1],))}
                hint = did_you_mean(target, known)
                raise ModelError(f"lora.targets: {self.name} has no linear layer '{target}'{hint}")
        for layer in self.linears:
            if len(layer.names) > 1 and not layer.chosen(targets) and any(_answers(layer, t) for t in targets):
                both = " and ".join(layer.names)
                raise ModelError(f"lora.targets: {both} are one tensor in {self.model_type}; name both or neither")
        return tuple(layer for layer in layers if layer.lora_rank and layer.chosen(targets))

    def lora_params(self, r: int, targets: Targets = "all-linear") -> int:
        """Trainable parameters of LoRA adapters of rank `r`, as PEFT builds them on transformers 5."""
        return sum(layer.lora_params(r) for layer in self.adapted(targets))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_json`, also after a round through JSON text."""
        linears = tuple(LinearLayer(**{**layer, "names": tuple(layer["names"])}) for layer in data["linears"])
        return cls(**{**data, "linears": linears})


def load_model_spec(model: Model, *, offline: bool | None = None) -> ModelSpec:
    """Finds `model.name`: a local folder, else the Hugging Face cache, else the built-in table, else the Hub.

    `offline` defaults to what HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE say. Raises ModelError when nothing answers, when
    what is found is not a supported model, and when the weights beside config.json are of another size than it says.
    """
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, model, "folder", model.revision)
    if folder.is_file():
        raise ModelError(f"{model.name} is a file; give the folder that holds config.json and the safetensors")
    if not is_hub_id(model.name):
        raise ModelError(
            f"there is no folder {model.name}, and that is no Hub id (ORGANISATION/NAME); correct the path"
        )
    snapshot = files.cached_snapshot(model.name, model.revision)
    if snapshot is not None:
        return _from_folder(snapshot, model, "cache", snapshot.name)
    row = table_config(model.name)
    if row is not None:
        return _spec(model.name, row, layout(row), source="table", revision=model.revision)
    if _offline_by_environment() if offline is None else offline:
        raise ModelError(_not_found(model.name, "the Hub is not asked, because this is offline"))
    return _from_hub(model)


def is_hub_id(name: str) -> bool:
    """Whether a string has the form NAME or ORGANISATION/NAME that the Hub allows."""
    parts = name.split("/")
    return len(parts) <= 2 and all(p and p[0] not in ".-~" and all(c.isalnum() or c in "._-" for c in p) for p in parts)


@cache
def table() -> dict[str, dict[str, Any]]:
    """config.json by name: every Hub id of `models.json`, and its rows' own short names."""
    rows = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))["models"]
    out = {}
    for row in rows:
        out[row["name"]] = row["config"]
        for name, changes in row["ids"].items():
            out[name] = {**row["config"], **changes}
    return out


def table_config(name: str) -> dict[str, Any] | None:
    """The Hub ignores case in names, and so does this."""
    return next((config for known, config in table().items() if known.lower() == name.lower()), None)


def _answers(layer: LinearLayer, target: str) -> bool:
    """Whether a target means this layer, or for fused experts a part of it."""
    if layer.names:
        return any(target == name or target.endswith(f".{name}") for name in layer.names)
    return layer.name == target or layer.name.endswith(f".{target}")


def _offline_by_environment() -> bool:
    yes = ("1", "ON", "YES", "TRUE")
    return any(os.environ.get(name, "").upper() in yes for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _from_folder(folder: Path, model: Model, source: Source, revision: str | None) -> ModelSpec:
    config = files.read_config(folder)
    checkpoint = files.read_checkpoint(folder)
    _refuse_unsuitable(model.name, config)
    if config["model_type"] in FAMILIES or checkpoint is None:
        counted = layout(config)
    else:
        counted = files.count_checkpoint(config, checkpoint)
    spec = _spec(model.name, config, counted, source=source, revision=revision, folder=folder, checkpoint=checkpoint)
    if checkpoint is not None and (held := checkpoint.params(tied=spec.tie_word_embeddings)) != spec.params:
        raise ModelError(
            f"{folder}: config.json describes {spec.params:,} parameters and the safetensors files hold {held:,}; "
            "one of them belongs to another model, so copy both again"
        )
    return spec


def _refuse_unsuitable(name: str, config: Mapping[str, Any]) -> None:
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise ModelError(f"{name} is already quantized ({method}); give the 16-bit model, which qlora quantizes itself")
    if config.get("vision_config") or config.get("audio_config"):
        kind = config.get("model_type")
        raise ModelError(f"{name} (model_type '{kind}') takes more than text; give a text-only checkpoint of it")


def _spec(
    name: str,
    config: Mapping[str, Any],
    counted: Layout,
    *,
    source: Source,
    revision: str | None,
    folder: Path | None = None,
    checkpoint: files.Checkpoint | None = None,
) -> ModelSpec:
    linear = sum(layer.params for layer in counted.linears if layer.kind != "router")
    # transformers builds in float32 what config.json gives no dtype; the key was torch_dtype before transformers 5
    dtype = files.DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))
    dtype = (checkpoint.dtype if checkpoint else None) or dtype or "fp32"
    return ModelSpec(
        name=name,
        model_type=config["model_type"],
        **counted.dims,
        params=counted.embedding_params + linear + counted.other_params,
        embedding_params=counted.embedding_params,
        linear_params=linear,
        other_params=counted.other_params,
        linears=counted.linears,
        dtype=dtype,  # type: ignore[arg-type]
        source=source,
        revision=revision,
        path=str(folder) if folder else None,
        weights_bytes=checkpoint.bytes if checkpoint else None,
    )


def _not_found(name: str, why: str) -> str:
    near = nearest(name, table())
    places = f"no local folder, not in the Hugging Face cache ({files.cache_root()}) and not in the built-in table"
    hint = f"did you mean '{near}'? Otherwise " if near else ""
    advice = f"{hint}give a local folder, or fetch it where there is a network with `hf download {name}`"
    return f"model {name} is {places}, and {why}; {advice}"


def _from_hub(model: Model) -> ModelSpec:
    """Fetches config.json only. One plain request finds out whether the Hub answers, because hf_hub_download repeats a
    failed one for 23 s (measured with huggingface_hub 2.4 and no name service)."""
    try:
        from huggingface_hub import errors, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
    except ImportError:
        raise ModelError(_not_found(model.name, "huggingface_hub is not installed to ask the Hub")) from None
    name, at = model.name, f" at {model.revision}" if model.revision else ""
    try:
        url = hf_hub_url(name, "config.json", revision=model.revision)
        session = get_session()
        hf_raise_for_status(session.head(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_S, follow_redirects=True))
        path = hf_hub_download(name, "config.json", revision=model.revision, etag_timeout=HUB_TIMEOUT_S)
    except errors.GatedRepoError:
        advice = "accept its licence on its page there, then set HF_TOKEN or run `hf auth login`"
        raise ModelError(f"{name} is gated on the Hub: {advice}") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name} has no revision '{model.revision}' on the Hub; correct model.revision") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(_not_found(name, "the Hub has none of that name, or a private one and no HF_TOKEN")) from None
    except errors.EntryNotFoundError:
        advice = "it may hold a GGUF or an adapter; give the model in Hugging Face layout"
        raise ModelError(f"{name}{at} has no config.json on the Hub; {advice}") from None
    except Exception as error:  # httpx, socket, proxy and disk errors have no common base
        reason = str(error).strip().split("\n")[0]
        raise ModelError(_not_found(name, f"the Hub does not answer ({type(error).__name__}: {reason})")) from None
    folder = Path(path).parent
    return _from_folder(folder, model, "hub", folder.name)
