"""Model folder and tokenizer, found before anything is started, so that what is missing is said in a sentence.

Left out: the weights, which `strategies/prepare.py` loads.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..launcher.errors import DataError, ModelError
from ..launcher.model_spec import ModelSpec
from ..launcher.schema import Model, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import Prepared

SAMPLES, SAMPLE_BYTES = 256, 4096  # 1 MiB of each file
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]  # no pickles


def model_folder(model: Model, spec: ModelSpec) -> Path:
    """A local folder with the weights: the user's, the one in the Hugging Face cache, or downloaded now.

    Raises ModelError when there are no safetensors, or no network to get them by.
    """
    folder = Path(spec.path) if spec.path and spec.source == "folder" else _from_hub(model)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no .safetensors file. Weights in pickles (.bin, .pt) are not opened; convert them once with "
            "`model.save_pretrained(FOLDER)` in a place where you trust them."
        )
    return folder


def _from_hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        found = snapshot_download(model.name, revision=model.revision, allow_patterns=WANTED, local_files_only=True)
        if any(Path(found).glob("*.safetensors")):
            return Path(found)
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=WANTED, etag_timeout=10))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the weights of {model.name} are not on this machine and could not be downloaded ({reason}). Fetch them where "
            f"there is a network with `hf download {model.name}`, or set `model:` to a local folder in Hugging Face layout."
        ) from None


def fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes, headers and evenly spaced samples of the weights' files: another fine-tune of the same model differs,
    and 140 GB are not read. What checkpoints of adapters belong to."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(SAMPLE_BYTES * 16))  # the header, or most of it
            for i in range(SAMPLES):
                handle.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """The folder's own tokenizer. Raises ModelError when it has none that opens."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {folder} does not open: {str(error).splitlines()[0]}") from None


def prepared_data(config: TrainConfig, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The rows of a run, tokenized with the base's tokenizer; from the cache when they have been before. Raises DataError, also for fewer
    samples than one global batch."""
    from .data import prepare  # numpy and more; a bare login node fetches models with this file and has neither

    prepared = prepare(
        config.data,
        config.objective,
        tokenizer=tokenizer,
        tokenizer_id=config.model.name,
        model_max_length=spec.max_position_embeddings,
        cache_dir=cache_folder() / "data",
        seed=config.optimization.seed,
    )
    batch, rows, samples = config.optimization.global_batch_size, len(prepared.train_rows), len(prepared.train)
    if samples < batch:
        raise DataError(
            f"{config.data.train[0].path}: {samples} training samples are fewer than one global batch of {batch}. Bring more rows, or "
            f"set optimization.global_batch_size: {max(1, samples // 8)} for about eight steps an epoch."
        )
    if rows < batch:
        note = f"the {rows} packed rows are fewer than one global batch of {batch}: an epoch is one short step"
        report = replace(prepared.report, notes=(*prepared.report.notes, note))
        prepared = replace(prepared, report=report)
    return prepared


def cache_folder() -> Path:
    """Where tokenized data is kept: TREBUCHET_CACHE, else the user's cache folder."""
    root = os.environ.get("TREBUCHET_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/trebuchet"
    return Path(root).expanduser()
