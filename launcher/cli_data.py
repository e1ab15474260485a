"""The verbs under `trebuchet data`, and `convert`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def add_data(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """`verb` makes a parser as `cli.parser` does for the others."""
    prepare = verb(
        "prepare",
        _prepare,
        "curate, tokenize and check the data ahead of a run; later runs find it cached",
        config=True,
        json=True,
    )
    prepare.add_argument("--output", metavar="FOLDER", help="write the curated rows here too, as JSON lines")
    prepare.add_argument(
        "--shards", type=int, metavar="N", help="do one part of N of the work; run it once more without, at the end"
    )
    prepare.add_argument("--shard", type=int, metavar="I", help="which part, from 0")


def _prepare(options: argparse.Namespace) -> int:
    from . import data_verbs
    from .errors import UserError

    if (options.shards is None) != (options.shard is None):
        raise UserError("--shards N and --shard I belong together.")
    if options.shards is not None:
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
