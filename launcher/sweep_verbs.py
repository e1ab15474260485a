"""What the command line does with sweeps: `sweep`, and `status`, `resume` and `cancel` where they are given one.

Left out: parsing (cli.py) and everything that Python callers need (sweep.py, sweep_text.py).
"""

from __future__ import annotations

import argparse
import json as json_module

from . import sweep_text
from .errors import UserError
from .sweep import SweepFolder, begin, cancel, open_sweep, plan_sweep
from .sweep import resume as go_on
from .sweep import start as hand_over

__all__ = ["cancel", "open_sweep", "resume", "start", "status"]


def start(options: argparse.Namespace) -> int:
    planned = plan_sweep(options.config, cluster=options.cluster, overrides=options.overrides)
    if options.dry_run:
        print(sweep_text.preview(planned), end="")
        return 0
    folder = begin(planned)
    print(hand_over(folder, range(len(planned.plans))))
    return _outcome(folder)


def resume(folder: SweepFolder, *, one_run_only: bool) -> int:
    """`one_run_only`: an option was given that makes sense for one run."""
    if one_run_only:
        raise UserError(f"--set and --verify are for one run; name a trial, such as {folder.trial(0).root}.")
    print(go_on(folder))
    return _outcome(folder)


def status(folder: SweepFolder, *, json: bool) -> int:
    found = sweep_text.table(folder)
    print(json_module.dumps(found, indent=1, ensure_ascii=False) if json else sweep_text.status(found))
    return 0


def _outcome(folder: SweepFolder) -> int:
    """0 when every trial is finished or on its way, else 1; the table where it is final."""
    found = sweep_text.table(folder)
    if found["state"] in ("PENDING", "RUNNING"):
        return 0
    print(sweep_text.status(found))
    return int(found["state"] != "SUCCEEDED")
