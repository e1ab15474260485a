"""Every cell of method x layout trains the same six steps on the same data, and equals one process of the same method.

Loss and gradient norm of every step, what of the model is on a rank, the kernel layer, the artefact in plain transformers and PEFT.
In the middle of each run over several ranks lies an evaluation; the run of one process has none. docs/strategies.md shows this table.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Run, not_repacked, same_as_exported

pytestmark = pytest.mark.slow

# (loss, gradient norm), relative. fp32: the ranks add in another order; 1.1e-7 was seen. bf16, adapters: the same products under the
# same autocast, 0.0 was seen; another CPU may cut a product of two rows unlike one of four. bf16, full: DDP's bf16 products sum
# their gradients in fp32 (7e-5 seen); FSDP2 gathers weights in bf16 and keeps the residual stream in it, where autocast keeps it
# in fp32 (2e-4 and 2.2e-3 seen). 8-bit states: blocks of two ranks are those of one, so bitsandbytes' step gives bitsandbytes' numbers
# (7e-8 and 2.1e-7 seen; another CPU's sums may tip a code); the kernel layer's tips one here and there (1.4e-5 and 2.1e-5 seen).
TOLERANCES = {
    "fp32": (1e-6, 2e-6),
    "bf16 adapters": (1e-4, 2e-3),
    "bf16 full": (2e-3, 2e-2),
    "8-bit": (1e-4, 2e-4),
}
FULL, LORA, QLORA = {"method": "full"}, {"method": "lora", "lora": {"r": 4}}, {"method": "qlora", "lora": {"r": 4}}
INT8 = {"method": "qlora", "quant": {"type": "int8"}, "lora": {"r": 4}}
METHODS = {"full": FULL, "lora": LORA, "qlora": QLORA}
BF16 = {"model": {"dtype": "bf16"}}
EIGHT_BIT = {"optimization": {"optimizer": "adamw-8bit"}}
KERNEL = {"optimization": {"optimizer": "adamw-8bit-kernel"}}
SMALL_FILES = 100_000  # bytes; the exported model is several times that

# name -> (ranks, strategy, what else); the reference of each is the cell of one process with its method, dtype and model.
CELLS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{f"ddp {m}": (2, {**s, "parallel": "ddp"}, {}) for m, s in METHODS.items()},
    **{f"fsdp2 {m}": (2, {**s, "parallel": "fsdp2"}, {}) for m, s in METHODS.items()},
    **{f"fsdp2 offload {m}": (2, {**s, "parallel": "fsdp2"}, {"chosen": {"offload": "params"}}) for m, s in METHODS.items()},
    **{f"fsdp2 bf16 {m}": (2, {**s, "parallel": "fsdp2"}, {"top": BF16}) for m, s in METHODS.items()},
    "ddp bf16 full": (2, {**FULL, "parallel": "ddp"}, {"top": BF16, "shard_bytes": SMALL_FILES}),
    "ddp int8": (2, {**INT8, "parallel": "ddp"}, {}),
    "ddp 8-bit full": (2, {**FULL, "parallel": "ddp"}, {"top": EIGHT_BIT}),
    "fsdp2 8-bit full": (2, {**FULL, "parallel": "fsdp2"}, {"top": EIGHT_BIT}),
    "fsdp2 kernel 8-bit full": (2, {**FULL, "parallel": "fsdp2"}, {"top": KERNEL}),
    "fsdp2 untied full": (2, {**FULL, "parallel": "fsdp2"}, {"model": "untied"}),
    "fsdp2 untied qlora": (2, {**QLORA, "parallel": "fsdp2"}, {"model": "untied"}),
    "fsdp2 checkpointing full": (2, {**FULL, "parallel": "fsdp2", "checkpointing": "full"}, {}),
    "fsdp2 selective lora": (2, {**LORA, "parallel": "fsdp2", "checkpointing": "selective"}, {}),
    "fsdp2 checkpointing offload qlora": (
        2, {**QLORA, "parallel": "fsdp2", "checkpointing": "full"}, {"chosen": {"offload": "params"}},
    ),
    "fsdp2 single scales qlora": (2, {**QLORA, "parallel": "fsdp2", "quant": {"double": False}}, {}),
    "fsdp2 3 ranks qlora": (3, {**QLORA, "parallel": "fsdp2"}, {}),
    "fsdp2 4 ranks full": (4, {**FULL, "parallel": "fsdp2"}, {"shard_bytes": SMALL_FILES}),
    "hsdp 2x2 full": (4, {**FULL, "parallel": "fsdp2", "dp_replicate": 2}, {}),
    "hsdp 2x2 qlora": (4, {**QLORA, "parallel": "fsdp2", "dp_replicate": 2}, {}),
}  # fmt: skip
REFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{m: (s, {}) for m, s in METHODS.items()},
    **{f"bf16 {m}": (s, {"top": BF16}) for m, s in METHODS.items()},
    "int8": (INT8, {}),
    "8-bit full": (FULL, {"top": EIGHT_BIT}),
    "untied full": (FULL, {"model": "untied"}),
    "untied qlora": (QLORA, {"model": "untied"}),
    "single scales qlora": ({**QLORA, "quant": {"double": False}}, {}),
}
SAVED = [
    "ddp lora",
    "fsdp2 full",
    "fsdp2 lora",
    "fsdp2 offload qlora",
    "fsdp2 3 ranks qlora",
    "hsdp 2x2 full",
    "fsdp2 untied full",
]
FSDP2 = [name for name in CELLS if not name.startswith("ddp")]


def reference_of(name: str) -> str:
    method = name.split()[-1]
    kind = next((k for k in ("bf16", "8-bit", "untied", "single scales") if k in name), None)
    return f"{kind} {method}" if kind else method


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    torch.manual_seed(1)
    model.lm_head.weight.data = torch.randn_like(model.lm_head.weight) * 0.02
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, untied_model: Path, run_cells: Run
) -> dict[str, list[dict[str, Any]]]:
    def cell(strategy: dict[str, Any], more: dict[str, Any], **flags: Any) -> dict[str, Any]:
        where = {"model": str(untied_model)} if "model" in more else {}
        return {"strategy": strategy, **more, **where, "export": True, **flags}

    one = {name: cell(strategy, more) for name, (strategy, more) in REFERENCES.items()}
    groups: list[dict[str, Any]] = [{"world": 1, "cells": one}]
    for world in (2, 3, 4):
        there = {n: (s, more) for n, (ranks, s, more) in CELLS.items() if ranks == world}
        save = {n: {"save": [6]} if n in SAVED else {} for n in there}
        cells = {n: cell(s, more, evaluate=True, **save[n]) for n, (s, more) in there.items()}
        groups.append({"world": world, "cells": cells})
    # Where an evaluation also lets the base answer, a forward pass a token: it is most of a cell's time, so two of them do.
    for name in ("fsdp2 full", "fsdp2 offload qlora"):
        groups[1]["cells"][name]["top"] = {"evaluation": {"forgetting": 1}}
    groups[1]["cells"]["left out"] = {"strategy": CELLS["fsdp2 full"][1], "leave_out": True}
    return run_cells(tmp_path_factory.mktemp("matrix"), groups)


@pytest.mark.parametrize("name", CELLS)
def test_every_step_equals_one_process(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    wanted = found[reference_of(name)][0]
    kind = "fp32" if "bf16" not in name else "bf16 full" if "fsdp2" in name and "full" in name else "bf16 adapters"
    kind = "8-bit" if "8-bit" in name else kind
    loss, norm = TOLERANCES[kind]
    for rank in found[name]:
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=loss)
        assert rank["norms"] == pytest.approx(wanted["norms"], rel=norm)
        assert rank["tokens"] == wanted["tokens"]
        assert rank["losses"] == found[name][0]["losses"]  # every rank reports the same numbers
    assert wanted["losses"][-1] < wanted["losses"][0]


@pytest.mark.parametrize("name", FSDP2)
def test_every_parameter_is_sharded_and_stays_so(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    ranks, strategy, _ = CELLS[name]
    shards = ranks // strategy.get("dp_replicate", 1)
    for rank in found[name]:
        assert rank["kinds"] == ["DTensor"]
        # Over 3 ranks the 4 rows of an adapter are 2, 1 and 1: 54,462 of 153,984 bytes on rank 0.
        assert rank["local_bytes"] == pytest.approx(rank["whole_bytes"] / shards, rel=0.15 if shards == 3 else 1e-3)
        assert {key: rank[key] for key in rank["after_evaluation"]} == rank["after_evaluation"]
    if strategy["method"] == "qlora":
        packed = sum(rank["packed_bytes"] for rank in found[name]) / (ranks / shards)
        assert packed == found[name][0]["whole_packed_bytes"] > 0
    assert sum(r["local_bytes"] for r in found[name]) / (ranks / shards) == found[name][0]["whole_bytes"]


@pytest.mark.parametrize("name", CELLS)
def test_the_kernel_layer_ran(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in found[name]:
        assert rank["kernels"].startswith("kernel layer (torch): ")
        assert ("; 0 modules not taken" in rank["kernels"]) == ("int8" not in name)  # bitsandbytes' own layers there
        assert {"rope", "token_loss", "rms_norm"} <= set(rank["calls"])
        wanted = set(found[reference_of(name)][0]["calls"])
        wanted |= {"adamw8bit_step"} if "kernel" in name else set()
        if (
            name == "fsdp2 bf16 full"
        ):  # autocast keeps the residual stream in fp32, and adding to it is not the kernel's
            wanted |= {"add_rms_norm", "add_rms_norm_backward"}
        assert set(rank["calls"]) == wanted


@pytest.mark.parametrize("name", [name for name in FSDP2 if "qlora" in name])
def test_gathered_bytes_are_those_of_bitsandbytes(
    found: dict[str, list[dict[str, Any]]], name: str, tiny_model: Path, untied_model: Path
) -> None:
    """After six steps, an evaluation and offload: packed weights and every scale, against the whole matrix quantized at once."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file

    double = CELLS[name][1].get("quant", {}).get("double", True)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    weights = load_file((untied_model if "untied" in name else tiny_model) / "model.safetensors")
    wanted = {}
    for key, weight in weights.items():
        if "_proj" not in key:
            continue
        packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=double)
        parts = {"weight": packed, "absmax": state.absmax, "code": state.code}
        if double:
            parts |= {"offset": state.offset, "code2": state.state2.code, "absmax2": state.state2.absmax}
        place = "base_model.model." + key.removesuffix("weight") + "base_layer."
        wanted |= {
            place + part: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for part, t in parts.items()
        }
    assert all(rank["frozen_bytes"] == wanted for rank in found[name]) and len(wanted) == 14 * (6 if double else 3)


@pytest.mark.parametrize("name", [*CELLS, *REFERENCES])
def test_the_artefact_opens_in_plain_transformers_and_peft(
    found: dict[str, list[dict[str, Any]]], name: str, untied_model: Path
) -> None:
    """Its logits are those of the model that was trained; an adapter has the names and shapes of one process."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = Path(found[name][0]["model"])
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    options: dict[str, Any] = {"dtype": dtype if not name.endswith("full") else torch.float32}
    if name.endswith("int8"):
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif name.endswith("qlora"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant="single scales" not in name,
        )  # fmt: skip
    model = not_repacked(AutoModelForCausalLM.from_pretrained(folder, **options))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(torch.arange(3, 35)[None]).logits.float()
    wanted = torch.load(folder / "logits.pt")
    # fp32: another order of products; bf16: a few roundings of 2^-8 in two layers, of logits around 0.3
    assert (logits - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2), name
    alone = Path(found[reference_of(name)][0]["model"])
    files = [sorted(f.glob("*.safetensors")) for f in (folder, alone)]
    shapes = [{n: (t.shape, t.dtype) for file in of_one for n, t in load_file(file).items()} for of_one in files]
    assert shapes[0] == shapes[1] and len(files[1]) == 1
    assert files[0][0].name.startswith("model" if name.endswith("full") else "adapter_model")
    if CELLS.get(name, (0, {}, {}))[2].get("shard_bytes"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert index == {n: file.name for file in files[0] for n in load_file(file)}
        sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files[0]]
        assert len(sizes) > 3 and max(sizes) <= SMALL_FILES
    else:
        assert len(files[0]) == 1
    if not name.endswith("full"):
        settings = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, alone)]
        for one in settings:
            one["target_modules"].sort()
        assert settings[0] == settings[1]


@pytest.mark.parametrize("name", SAVED)
def test_one_process_reads_the_trained_weights_of_every_checkpoint(
    found: dict[str, list[dict[str, Any]]], name: str, tiny_model: Path
) -> None:
    same_as_exported(found[name][0], tiny_model)


def test_a_module_that_is_left_whole_stops_the_run(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found["left out"]:
        assert "parameters are not sharded over 2 ranks: model.embed_tokens.weight" in rank["error"]
        assert "and the plan counts on" in rank["error"]
