"""What a login node without torch fetches for compute nodes without a network: the model's files, tokenizer and template among them.

They go into the Hub's own cache (HF_HOME), where the nodes look for them with HF_HUB_OFFLINE=1. Left out: data that only the
`datasets` library can fetch; they are refused here, because on the node it would be too late.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import DataError, ModelError
from .model_files import cache_root, cached_snapshot
from .plan import Plan


def fetch(decided: Plan) -> None:
    """Returns when every file that a run needs is on this file system. Raises ModelError or DataError with what to do."""
    _data(decided)
    model = decided.config.model
    if decided.model.source == "folder":
        return
    if find_spec("huggingface_hub") is not None:
        from ..training.load import model_folder

        model_folder(model, decided.model)
        return
    there = cached_snapshot(model.name, model.revision)
    if there is None or not any(there.glob("*.safetensors")):
        raise ModelError(
            f"the weights of {model.name} are not in {cache_root()}, compute nodes have no network, and this Python cannot download them: "
            "`pip install huggingface_hub` here, or set `model:` to a folder that the nodes see."
        )


def _data(decided: Plan) -> None:
    data = decided.config.data
    sources = [*data.train, *(data.eval if not isinstance(data.eval, float) else ())]
    for source in sources:
        if not Path(source.path).expanduser().exists():
            raise DataError(
                f"data: {source.path} is no file here. Compute nodes have no network, and fetching a dataset takes the `datasets` library: "
                "`pip install 'trebuchet[train]'` on this machine, or download the files and name them."
            )
