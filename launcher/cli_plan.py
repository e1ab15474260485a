"""The verbs of the planner: `plan`, with or without a probe, and `estimate` from flags or a file."""

from __future__ import annotations

import argparse
from typing import Any

# Flag -> what it says; the names are those of a request in `estimate --json FILE`, and what is left out takes its default there.
WORDS = {
    "method": "full, lora, qlora or lora8",
    "objective": "sft, dpo, …",
    "lora_targets": "all-linear, or names between commas: q,k,v,o,gate,up,down,lm_head",
    "precision": "bf16, fp16, fp32, bf16-mixed or fp16-mixed",
    "optimizer": "adamw, adamw-foreach, adamw-8bit, paged-adamw-8bit or sgd",
    "parallel": "none, ddp, fsdp1, fsdp2, zero2 or zero3",
    "offload": "none, optimizer or params",
    "checkpointing": "none, full or selective",
    "attention": "flash, sdpa or eager",
    "kernels": "none, ce, fused, chunked-ce or trebuchet",
}
NUMBERS = {
    "lora_r": "rank of the adapters",
    "gpus": "GPUs of the job",
    "dp_replicate": "whole copies of the sharded state (HSDP)",
    "gpus_per_node": "ranks that share one host",
    "seq_len": "tokens of a row",
    "micro_batch": "rows of one forward pass and GPU",
    "accumulation": "micro-batches of a step",
}


def add_estimate(verb: Any) -> None:
    sub = verb("estimate", estimate, "memory of one strategy from flags, or of many from a file of requests")
    sub.add_argument("--json", metavar="FILE", dest="requests", help="a list of requests; - reads standard input")
    sub.add_argument("--model", metavar="NAME|FOLDER", help="as `model:` of a YAML; only its sizes are read")
    for name, text in WORDS.items():
        sub.add_argument(_flag(name), help=text)
    for name, text in NUMBERS.items():
        sub.add_argument(_flag(name), type=int, metavar="N", help=text)
    sub.add_argument("--lora-dropout", type=float, metavar="P", help="not given: budgeted as if it were on")
    sub.add_argument(
        "--no-double-quant", dest="double_quant", action="store_const", const=False, help="qlora: fp32 scales"
    )
    sub.add_argument(
        "--no-packing", dest="packed", action="store_const", const=False, help="rows are up to --seq-len long"
    )


def plan_verb(options: argparse.Namespace) -> int:
    from . import api
    from .cli import print_json
    from .plan_text import render

    plan = api.plan(options.config, cluster=options.cluster, overrides=options.overrides)
    probed = None
    if options.probe and plan.feasible:
        from .probing import probe

        probed = probe(plan)
    if options.json:
        print_json(plan.public() | ({"probe": probed} if probed else {}))
    else:
        print(render(plan), end="")
        if probed:
            print("\n" + "\n".join(probe_lines(probed)))
    return 0 if plan.feasible else 3


def estimate(options: argparse.Namespace) -> int:
    from .errors import UserError
    from .estimates import answer, of_flags

    names = (*WORDS, *NUMBERS, "lora_dropout", "double_quant", "packed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if (options.requests is None) == (options.model is None):
        raise UserError("estimate takes either --json FILE, or --model NAME and the settings of one run as flags.")
    if options.requests is not None and given:
        raise UserError(f"{_flag(next(iter(given)))} goes with --model; with --json every setting is in the file.")
    print(answer(options.requests) if options.requests is not None else of_flags(options.model, given))
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def probe_lines(found: dict[str, Any]) -> list[str]:
    """The probe beside the formula, and a sentence where they are more than 5 % apart."""
    lines = [f"Probe: one step on fake tensors, {found['seconds']:.0f} s"]
    if found["measured_at"] != [found["layers"]]:
        *some, last = found["measured_at"]
        lines.append(
            f"  measured at {', '.join(map(str, some))} and {last} of {found['layers']} layers: all are alike, and every moment was "
            "linear in depth"
        )
    for phase, pair in found["phases"].items():
        lines.append(f"  {phase:<18} {pair['probe_gib']:8.2f} GiB live   formula {pair['formula_gib']:8.2f}")
    difference = 100 * found["difference"]
    if abs(difference) > 5:
        lines.append(
            f"  The formula is {difference:+.1f} % from the probe's peak: more than 5 %. Trust the probe, and report this."
        )
    else:
        lines.append(f"  The formula is {difference:+.1f} % from the probe's peak.")
    return lines
