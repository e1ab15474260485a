"""The verbs after training: merge, export, eval. Each opens a finished run and does its work in this process.

Registered by `cli.py`; like there, each function imports what it needs when it is called.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

DTYPES = ("auto", "bf16", "fp16", "fp32")


def add_verbs(verb: Any) -> None:
    """`verb(name, function, text, json=…)` makes a subparser."""
    merge = verb("merge", _merge, "the adapter of a run into its base, and proof that it is the same model", json=True)
    merge.add_argument("run", metavar="RUN")
    merge.add_argument(
        "--base", choices=("quantized", "original"),
        help="QLoRA: the NF4 weights it was trained on, dequantized (default), or the weights before quantization",
    )  # fmt: skip
    merge.add_argument("--dtype", choices=DTYPES, default="auto", help="of the merged weights; auto: that of the base")
    merge.add_argument("--output", metavar="FOLDER", help="default: RUN/merged")
    merge.add_argument("--tolerance", type=float, metavar="X", help="largest relative difference of the logits")
    merge.add_argument("--changed", action="store_true", help="take an adapter that is not what the run wrote")
    merge.add_argument(
        "--allow-pickle", action="store_true", help="read an adapter_model.bin, with the weights-only loader"
    )
    report = verb("report", _report, "one HTML file of a run, or of several side by side")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run, or a folder of runs")
    report.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run, or in the folder of the first"
    )
    ui = verb("ui", _ui, "the runs of a folder as live pages, on 127.0.0.1 with a token; read-only")
    ui.add_argument("folder", metavar="FOLDER", nargs="?", default="runs")
    ui.add_argument("--port", type=int, default=0, help="default: one that is free")


def quiet() -> None:
    """Nothing is fetched and no bars are drawn, as in a run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _merge(options: argparse.Namespace) -> int:
    quiet()
    from ..training.finished import open_finished
    from ..training.merge import Options, merge
    from .cli import print_json

    run = open_finished(options.run)
    chosen = Options(
        base=options.base,
        dtype=None if options.dtype == "auto" else options.dtype,
        tolerance=options.tolerance,
        changed=options.changed,
        allow_pickle=options.allow_pickle,
    )
    output = Path(options.output).expanduser().absolute() if options.output else run.folder.merged
    found = merge(run, output, chosen)
    if options.json:
        print_json(found)
    else:
        print(merged_text(found))
    return 0


def merged_text(found: dict[str, Any]) -> str:
    one = found["difference"]
    source = {"quantized": "the NF4 weights it was trained on", "original": "the original weights"}[found["base"]]
    lines = [
        f"merged into {source}, stored in {found['dtype']}",
        f"  proof: relative difference {one['relative']:.2e} (at most {found['tolerance']:g}), KL {one['kl_nats']:.1e} nats, same next "
        f"token at {one['same_token']:.1%} of {one['positions']} positions",
    ]
    if found["difference_from_trained"]:
        other = found["difference_from_trained"]
        lines.append(
            f"  against the quantized model that was trained: relative {other['relative']:.2e}, KL {other['kl_nats']:.1e} nats"
        )
    if found["untied"]:
        lines.append("  embedding and head are not tied any more: the adapter changed them differently")
    if found["unread"]:
        lines.append(
            f"  {len(found['unread'])} tensors of the base's files belong to no module and were left out: {found['unread'][0]} …"
        )
    return "\n".join([*lines, f"model   {found['folder']}"])


def _report(options: argparse.Namespace) -> int:
    from .report import collect, page

    runs = collect.find(options.runs)
    first = runs[0].folder
    default = first.report if len(runs) == 1 else first.root.parent / "report.html"
    print(f"report  {page.write(runs, Path(options.output).expanduser().absolute() if options.output else default)}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    from .ui import serve

    serve(options.folder, options.port)
    return 0
