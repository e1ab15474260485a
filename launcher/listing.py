"""The runs of a folder, filtered and sorted, what they cost, and where a model came from.

    trebuchet list --where state=FAILED --where 'loss<2' --sort loss
    trebuchet list --cost                    GPU-hours and money of each run and of the folder, from records and cluster files
    trebuchet show RUN --lineage             from a model back to its base, its rows and its seeds

A project is the folder that runs lie in. Left out: anything that is not in a record.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean
from .report import collect
from .run_folder import RunFolder
from .sweep import SweepFolder

KEYS = ("run", "state", "step", "created", "model", "loss", "verdict", "method", "data", "gpu_hours", "cost", "seed")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
CONDITION = re.compile(r"^\s*(\w+)\s*(<=|>=|!=|<|>|=|~)\s*(.*?)\s*$")


def more_of(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `run_text.runs_of` with what filters and sorting may name. A sweep has what all its trials took together, and the
    rest from its first one."""
    root = Path(entry["folder"])
    trials = SweepFolder(root).trials() if entry["trials"] else [RunFolder(root)]
    runs = [collect.read(trial) for trial in trials]
    run, costs = runs[0], [one.cost for one in runs if one.cost is not None]
    return {
        **entry,
        "loss": entry["loss_after"],
        "verdict": None if entry["trials"] else (run.record.get("evaluation") or {}).get("verdict"),
        "method": run.chosen.get("method"),
        "data": (run.record.get("data") or {}).get("fingerprint"),
        "seed": run.record.get("seed"),
        "gpu_hours": round(sum(one.gpu_hours for one in runs), 4),
        "cost": round(sum(costs), 4) if len(costs) == len(runs) else None,
    }


def choose(entries: Sequence[dict[str, Any]], where: Sequence[str], sort: str | None) -> list[dict[str, Any]]:
    """Entries for which every condition holds; `sort` is a key, with - in front for the largest first. An entry without a value
    fulfils no comparison and stands last. Raises UserError for a condition or key that does not exist."""
    tests = [condition(text) for text in where]
    found = [entry for entry in entries if all(test(entry) for test in tests)]
    if sort is None:
        return found
    key = known(sort.removeprefix("-"))
    having = sorted((e for e in found if e[key] is not None), key=lambda e: e[key], reverse=sort.startswith("-"))
    return having + [e for e in found if e[key] is None]


def condition(text: str) -> Callable[[dict[str, Any]], bool]:
    """`key=value`, `key<number`, `key~part` and so on."""
    match = CONDITION.match(text)
    if match is None:
        raise UserError(f"--where {text}: a condition is KEY=VALUE, also with != < <= > >= or ~ (contains).")
    key, sign, value = known(match[1]), match[2], match[3]

    def holds(entry: dict[str, Any]) -> bool:
        here = entry[key]
        if here is None:
            return False
        if sign == "~":
            return value.lower() in str(here).lower()
        if isinstance(here, (int, float)):
            try:
                return COMPARE[sign](here, float(value))
            except ValueError:
                raise UserError(f"--where {text}: {key} is a number.") from None
        return COMPARE[sign](str(here), value)

    return holds


def known(key: str) -> str:
    if key not in KEYS:
        raise UserError(f"there is no key '{key}'{did_you_mean(key, KEYS)}")
    return key


def costs(entries: Sequence[dict[str, Any]], folder: str) -> str:
    """A line for each run and one for the folder."""
    rows = [("RUN", "STATE", "GPU HOURS", "COST")]
    money = lambda value: "no price" if value is None else f"{value:.2f}"  # noqa: E731
    rows += [(e["run"], e["state"], f"{e['gpu_hours']:.2f}", money(e["cost"])) for e in entries]
    priced = [e["cost"] for e in entries if e["cost"] is not None]
    total = f"{sum(priced):.2f}" + (
        "" if len(priced) == len(entries) else f" ({len(entries) - len(priced)} runs without a price)"
    )
    rows.append((f"all of {folder}", "", f"{sum(e['gpu_hours'] for e in entries):.2f}", total))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def lineage(folder: RunFolder) -> dict[str, Any]:
    """From the newest artefact back: exports, merged model, adapter or model, run, base with revision, rows with fingerprints, seeds."""
    run = collect.read(folder)
    record, config = run.record, run.config
    data = record.get("data") or {}
    merged = record.get("merge")
    return {
        "pushed": [
            {key: one.get(key) for key in ("to", "name", "version", "what", "at")} for one in record.get("pushed") or []
        ],
        "exports": record.get("exports") or {},
        "merged": None
        if merged is None
        else {key: merged.get(key) for key in ("folder", "base", "dtype", "files", "adapter_files")},
        "model": {"folder": str(folder.model), "files": record.get("model_files")},
        "run": {
            "name": record["run"],
            "folder": str(folder.root),
            "step": record["step"],
            "created": record["created"],
        },
        "method": run.chosen.get("method"),
        "base": {"name": record["model"]["name"], "revision": record["model"].get("revision")},
        "data": {
            "fingerprint": data.get("fingerprint"),
            "sources": [
                {k: s[k] for k in ("path", "used_for", "rows", "fingerprint")} for s in data.get("sources", [])
            ],
            "train_samples": (data.get("train") or {}).get("samples"),
        },
        "seed": record.get("seed"),
        "order": "the order of the rows is a function of the seed and the step",
        "code": {"trebuchet": record["versions"].get("trebuchet"), "git": record.get("git")},
        "objective": (config.get("objective") or {}).get("name"),
    }


def lineage_text(found: dict[str, Any]) -> str:
    lines = [
        f"pushed  {one['what']} to {one['to']} as {one['name']}"
        + (f" version {one['version']}" if one["version"] else "")
        + f", {one['at']}"
        for one in found["pushed"]
    ]
    for name, one in found["exports"].items():
        lines.append(f"{name}  {one['file']}")
    if found["merged"]:
        lines.append(
            f"merged  {found['merged']['folder']} ({found['merged']['dtype']}, into the {found['merged']['base']} base)"
        )
        lines += [f"          {name} sha256 {digest[:16]}" for name, digest in (found["merged"]["files"] or {}).items()]
    lines.append(f"model   {found['model']['folder']}")
    lines += [f"          {name} sha256 {digest[:16]}" for name, digest in (found["model"]["files"] or {}).items()]
    lines.append(
        f"run     {found['run']['name']}: {found['objective']} by {found['method']}, {found['run']['step']} steps, seed {found['seed']}"
    )
    lines.append(
        f"base    {found['base']['name']}"
        + (f" at {found['base']['revision']}" if found["base"]["revision"] else ", no revision given")
    )
    lines += [
        f"rows    {s['path']}: {s['rows']:,} for {s['used_for']}, fingerprint {s['fingerprint']}"
        for s in found["data"]["sources"]
    ]
    lines.append(
        f"code    trebuchet {found['code']['trebuchet']}"
        + (f", commit {found['code']['git']['commit'][:12]}" if found["code"]["git"] else "")
    )
    return "\n".join(lines)
