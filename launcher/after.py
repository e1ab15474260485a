"""The verbs about runs that exist: list, show, merge, export, push, report, ui; eval is evaluating.py's. Each does its work in this
process.

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
    from .evaluating import add_eval

    listing = verb("list", _list, "the runs of a folder", json=True)
    listing.add_argument("folder", metavar="FOLDER", nargs="?", default="runs")
    listing.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="also != < <= > >= and ~ (contains)"
    )
    listing.add_argument("--sort", metavar="KEY", help="--sort=-KEY: largest first")
    listing.add_argument("--cost", action="store_true", help="GPU-hours and money of each run and of the folder")
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
    add_eval(verb)
    export = verb("export", _export, "what a run made, for others: a folder, an adapter to serve, or a GGUF file")
    export.add_argument("run", metavar="RUN")
    export.add_argument("--format", choices=("hf", "adapter", "vllm", "gguf"), default="hf")
    export.add_argument("--quant", choices=("f16", "q8_0"), default="f16", help="of a GGUF file")
    export.add_argument("--output", metavar="FOLDER", help="default: RUN/exports/FORMAT")
    push = verb("push", _push, "a model of a run into a registry; nothing is pushed unless asked", json=True, dry="it")
    push.add_argument("run", metavar="RUN")
    push.add_argument("--to", choices=("hub", "wandb", "mlflow"), required=True)
    push.add_argument("--name", metavar="NAME", required=True, help="in the registry; on the Hub OWNER/NAME")
    push.add_argument(
        "--what", default="model", metavar="PART", help="model, merged, or an export, such as hf or gguf-f16"
    )
    push.add_argument("--public", action="store_true", help="a new repository on the Hub; private otherwise")
    report = verb("report", _report, "one HTML file of a run, or of several side by side")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run, a sweep, or a folder of runs")
    report.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run, or in the folder of the first"
    )
    show = verb("show", _show, "one run; --lineage walks from its models back to base, rows and seeds", json=True)
    show.add_argument("run", metavar="RUN")
    show.add_argument("--lineage", action="store_true")
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

    if len(options.runs) == 1 and not options.output:
        from .report import sweeps
        from .sweep import open_sweep

        if several := open_sweep(options.runs[0]):
            print(f"report  {sweeps.write(several)}")
            return 0
    runs = collect.find(options.runs)
    first = runs[0].folder
    default = first.report if len(runs) == 1 else first.root.parent / "report.html"
    print(f"report  {page.write(runs, Path(options.output).expanduser().absolute() if options.output else default)}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    from .ui import serve

    serve(options.folder, options.port)
    return 0


def _export(options: argparse.Namespace) -> int:
    quiet()
    from ..training.deliver import export
    from ..training.finished import open_finished

    run = open_finished(options.run)
    name = f"gguf-{options.quant}" if options.format == "gguf" else options.format
    output = Path(options.output).expanduser().absolute() if options.output else run.folder.exports / name
    output.parent.mkdir(parents=True, exist_ok=True)
    print("\n".join(export(run, options.format, output, quant=options.quant)))
    return 0


def _push(options: argparse.Namespace) -> int:
    from ..training.finished import open_finished
    from ..training.push import push
    from .cli import print_json
    from .listing import lineage

    run = open_finished(options.run)
    found = push(
        run,
        options.to,
        options.name,
        origin=lineage(run.folder),
        what=options.what,
        public=options.public,
        dry_run=options.dry_run,
    )
    if options.json:
        print_json(found)
        return 0
    size = f"{len(found['files'])} files, {found['bytes'] / 2**20:,.1f} MiB"
    if options.dry_run:
        print(
            "\n".join([f"would push {size} to {found['to']} as {found['name']}:", *(f"  {n}" for n in found["files"])])
        )
    else:
        version = f" version {found['version']}" if found["version"] else ""
        print(f"pushed  {size} to {found['to']} as {found['name']}{version}\n        {found['url']}")
        if not found.get("linked", True):
            print("        offline: send it with `wandb sync`, then link the artifact into the registry")
    return 0


def _show(options: argparse.Namespace) -> int:
    from . import record
    from .cli import print_json
    from .listing import lineage, lineage_text
    from .run_folder import open_run
    from .run_text import outcome, status

    folder = open_run(options.run)
    facts = record.read(folder)
    if options.lineage:
        found = lineage(folder)
        print_json(found) if options.json else print(lineage_text(found))
    elif options.json:
        print_json(facts)
    else:
        print(status(folder, facts) + "\n" + outcome(folder, facts))
    return 0


def _list(options: argparse.Namespace) -> int:
    from .cli import print_json
    from .listing import choose, costs, more_of
    from .run_text import listing, runs_of

    found = choose([more_of(entry) for entry in runs_of(options.folder)], options.where, options.sort)
    if options.json:
        print_json(found)
    elif options.cost:
        print(costs(found, options.folder))
    else:
        print(listing(found, options.folder))
    return 0
