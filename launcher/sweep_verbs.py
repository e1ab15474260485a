"""What the command line does with sweeps: `sweep`, and `status`, `resume` and `cancel` where they are given one.

Left out: parsing (cli.py) and everything that Python callers need (sweep.py, sweep_text.py).
"""

from __future__ import annotations

import argparse
import json as json_module
import sys
from collections.abc import Sequence

from . import sweep_follow, sweep_text
from .errors import UserError
from .sweep import SweepFolder, begin, cancel, give, open_sweep, plan_sweep
from .sweep import resume as go_on
from .sweep import start as hand_over

__all__ = ["cancel", "open_sweep", "resume", "start", "status"]


def start(options: argparse.Namespace) -> int:
    planned = plan_sweep(options.config, cluster=options.cluster, overrides=options.overrides)
    if options.dry_run:
        print(sweep_text.preview(planned), end="")
        return 0
    folder = begin(planned)
    print(hand_over(folder, range(len(planned.plans))), flush=True)
    return _outcome(folder, follow=options.follow)


def resume(folder: SweepFolder, overrides: Sequence[str], *, verify: bool) -> int:
    if verify:
        raise UserError(f"--verify is for one run; name a trial, such as {folder.trial(0).root}.")
    if overrides:
        give(folder, overrides)
    print(go_on(folder), flush=True)
    return _outcome(folder, follow=False)


def status(folder: SweepFolder, *, json: bool, follow: bool) -> int:
    if follow:
        sweep_follow.follow(folder, sys.stdout)
        return 0
    found = sweep_text.table(folder)
    print(json_module.dumps(found, indent=1, ensure_ascii=False) if json else sweep_text.status(found))
    return 0


def _outcome(folder: SweepFolder, *, follow: bool) -> int:
    """0 when every trial is finished or on its way, else 1; the table where it is final, and the page with its figures."""
    if follow:
        found = sweep_follow.until_the_end(folder, sys.stdout)
    elif (found := sweep_text.table(folder))["state"] not in ("PENDING", "RUNNING"):
        print(sweep_text.status(found))
    else:
        return 0
    print(sweep_follow.write_page(folder))
    return int(found["state"] != "SUCCEEDED")
