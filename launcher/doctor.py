"""`trebuchet doctor`: is this machine fit to train, check by check, each with one line and what to do about it.

The checks are in `doctor_checks.py`; here is the report: its shape, its text, its JSON. Left out: judging a remote
cluster, and any repair. Nothing here imports torch; a subprocess with a time limit asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
SIGNS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `advice` is what to do, empty where nothing is."""

    name: str
    status: Status
    line: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings in the order they were made."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of the checks."""
        found = {check.status for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"

    @property
    def exit_code(self) -> int:
        """0, or 1 when a check failed; a warning is no failure."""
        return 1 if self.status == "fail" else 0

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "checks": [asdict(check) for check in self.checks]}


def doctor(folder: Path | None = None, *, probe_timeout_s: float = 120) -> Report:
    """Checks this machine; `folder` is where runs would be written (default: the working directory).

    Takes as long as one import of torch and bitsandbytes. A probe that hangs longer than `probe_timeout_s` is a failure
    of the report, not of this function.
    """
    from . import doctor_checks as checks

    folder = folder or Path.cwd()
    found: list[Check] = [checks.python(), *checks.packages()]
    devices, gpu_check = checks.gpus()
    found.append(gpu_check)
    found += checks.torch_stack(devices, probe_timeout_s)
    found += [checks.processors(), checks.shared_memory(), checks.writing(folder), *checks.disk(folder)]
    found += [checks.hub(), checks.tokens(), *checks.schedulers()]
    return Report(checks=tuple(found))


def of_allocation(found: dict[str, Any]) -> Report:
    """What the ranks of an allocation found together (training/allocation.py), as a report. Without `ranks` they did not all come, and
    there are faults alone."""
    faults = [Check(name="fault", status="fail", line=line) for line in found["problems"]]
    if "ranks" not in found:
        return Report(checks=tuple(faults))
    nodes = {one["node"]: 0 for one in found["ranks"]}
    for one in found["ranks"]:
        nodes[one["node"]] += 1
    ranks = ", ".join(f"{node}: {count}" for node, count in nodes.items())
    checks = [
        Check(
            name="ranks",
            status="ok",
            line=f"{len(found['ranks'])} ranks met ({ranks}) and answered in {found['seconds']} s",
        )
    ]
    if found["all_reduce_gbps"] is not None:
        checks.append(Check(name="all-reduce", status="ok", line=f"{found['all_reduce_gbps']} GB/s (bus)"))
    free = min(one["free_bytes"] for one in found["ranks"]) / 2**30
    checks.append(Check(name="folder", status="ok", line=f"seen and written by every rank, {free:,.1f} GiB free"))
    if found["problems"]:
        checks = [check for check in checks if check.name == "ranks"]
    return Report(checks=(*checks, *faults))


def render(report: Report) -> str:
    """The report as text: one line a check, the advice under it, the verdict last."""
    width = max(len(check.name) for check in report.checks)
    lines = []
    for check in report.checks:
        lines.append(f"{SIGNS[check.status]}  {check.name:<{width}}  {check.line}")
        if check.advice:
            lines.append(f"{'':<{width + 8}}-> {check.advice}")
    return "\n".join([*lines, "", _verdict(report.checks)])


def _verdict(checks: Sequence[Check]) -> str:
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    warnings = f"{warned} warning{'s' if warned != 1 else ''}"
    if failed:
        return f"not fit to train: {failed} failed, {warnings}"
    return f"fit to train, with {warnings}" if warned else "fit to train"
