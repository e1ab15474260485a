"""The verbs under `trebuchet data`, and `convert`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_data(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """`verb` makes a parser as `cli.parser` does for the others."""
    prepare = verb(
        "prepare",
        _prepare,
        "curate, tokenize and check the data ahead of a run; later runs find it cached",
        config=True,
        json=True,
        cluster=True,
    )
    prepare.add_argument("--output", metavar="FOLDER", help="write the curated rows here too, as JSON lines")
    prepare.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="with --cluster: cut the work into N jobs there, wait, and put together; with --shard: do one part here",
    )
    prepare.add_argument("--shard", type=int, metavar="I", help="which part, from 0; run once more without, at the end")
    inspect = verb(
        "inspect", _inspect, "show samples with the tokens that carry loss, and counts of all of them", config=True
    )
    inspect.add_argument(
        "--samples", type=_positive, default=3, metavar="N", help="how many, spread over the set (default 3)"
    )
    inspect.add_argument("--html", metavar="FILE", help="write a page that a browser opens, instead of text")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def add_convert(verb: Callable[..., argparse.ArgumentParser]) -> None:
    convert = verb(
        "convert",
        _convert,
        "an axolotl, LlamaFactory or TRL YAML into ours, with a line for every key not carried",
        json=True,
    )
    convert.add_argument("file", metavar="FILE")
    convert.add_argument(
        "--from",
        choices=("axolotl", "llamafactory", "trl"),
        dest="origin",
        help="whose YAML it is; default: by its keys",
    )
    convert.add_argument("--objective", metavar="NAME", help="sft, dpo, kto, …, where the file does not say it")
    convert.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="devices that it was written for, for the global batch"
    )
    convert.add_argument("--output", metavar="FILE", help="write the YAML there instead of printing it")


def _convert(options: argparse.Namespace) -> int:
    from .convert import convert

    made = convert(options.file, format=options.origin, objective=options.objective, gpus=options.gpus)
    if options.json:
        found = {"format": made.format, "config": made.tree, "carried": made.carried, "lines": made.lines}
        print(json.dumps(found | {"empty": made.empty}, indent=1, ensure_ascii=False))
        return 0
    said = [f"# {len(made.carried)} keys of {made.format} carried"]
    if made.lines:
        said += ["# not carried, or not just so:", *(f"#   {line}" for line in made.lines)]
    if made.empty:
        said.append(f"# without a value: {', '.join(made.empty)}")
    if options.output:
        from .record import write_atomically

        write_atomically(Path(options.output), made.text())
        print("\n".join([*said, f"# written: {options.output}"]))
    else:
        print("\n".join(said), file=sys.stderr)
        print(made.text(), end="")
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from . import data_verbs
    from .errors import UserError

    given = [value is not None for value in (options.shards, options.shard, options.cluster)]
    if given not in ([False] * 3, [True, True, False], [True, False, True]):
        raise UserError("--shards N goes with --cluster NAME, or with --shard I for one part on this machine.")
    if options.cluster is not None:
        for line in data_verbs.prepare_on(options.cluster, options.config, options.shards, overrides=options.overrides):
            print(f"{line}; made here", file=sys.stderr)
    elif options.shards is not None:
        made = data_verbs.prepare_part(options.config, options.shards, options.shard, overrides=options.overrides)
        print(
            json.dumps({"blocks": made})
            if options.json
            else f"part {options.shard} of {options.shards}: {made} blocks of rows made"
        )
        return 0
    report: dict[str, Any] = data_verbs.prepare(options.config, overrides=options.overrides, output=options.output)
    if options.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print("\n".join([*report["lines"], *report.get("files", [])]))
        print("from the cache" if report["cached"] else "cached for the runs that follow")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from . import data_verbs, record
    from .errors import UserError

    given: dict[str, Any] = {"samples": options.samples, "overrides": options.overrides}
    if options.html:
        try:
            record.write_atomically(Path(options.html), data_verbs.inspect(options.config, page=True, **given))
        except OSError as error:
            raise UserError(f"{options.html} could not be written: {error.strerror or error}.") from None
        print(f"written to {options.html}")
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows question marks instead of failing
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(data_verbs.inspect(options.config, colour=colour, **given), end="")
    return 0
