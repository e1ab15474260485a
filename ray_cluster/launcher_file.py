"""`trebuchet cluster up | resize | down | status FILE` for files of Ray's own cluster launcher: the same verbs by Ray's own commands.

Such a file names a cloud or a list of machines and says how Ray starts there (docs.ray.io, "Launching Clusters"); `ray up` keeps its
own state. Nothing is kept here. Runs and sweeps go to such a cluster through a cluster file with `ray: {provider: existing}`.
Left out: writing these files.
"""

from __future__ import annotations

import copy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ..launcher.errors import ClusterError
from .state import ray_program

KEYS = (
    "cluster_name",
    "provider",
    "available_node_types",
)  # together they are in every file of Ray's and in none of ours


def read(path: str) -> dict[str, Any] | None:
    """The file when it is one of Ray's launcher; None when it is anything else, which is for others to judge."""
    file = Path(path).expanduser()
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return None
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) and all(key in tree for key in KEYS) and "scheduler" not in tree else None


def up(path: str) -> str:
    """Ray's own last words, among them where the cluster is."""
    return ray("up", "--yes", "--no-config-cache", path)


def down(path: str) -> str:
    return ray("down", "--yes", path)


def resize(path: str, tree: dict[str, Any], nodes: int, *, at_most: bool) -> str:
    """Hands the head the same file with other limits; its processes go on (`--no-restart`)."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=Path(path).expanduser().absolute().parent) as file:
        yaml.safe_dump(resized(tree, nodes, at_most=at_most), file, sort_keys=False)
        file.flush()
        return ray("up", "--yes", "--no-config-cache", "--no-restart", file.name)


def resized(tree: dict[str, Any], nodes: int, *, at_most: bool) -> dict[str, Any]:
    """A copy whose one kind of worker has these limits. Raises ClusterError where it is not one kind."""
    changed = copy.deepcopy(tree)
    kinds = [name for name in changed["available_node_types"] if name != changed.get("head_node_type")]
    if len(kinds) != 1:
        names = ", ".join(kinds) or "none"
        raise ClusterError(
            f"{tree['cluster_name']} has {len(kinds)} kinds of workers ({names}), and a number does not say which; set min_workers and "
            "max_workers in the file and `trebuchet cluster up` it again."
        )
    worker = changed["available_node_types"][kinds[0]]
    worker["min_workers"], worker["max_workers"] = 0 if at_most else nodes, nodes
    changed["max_workers"] = nodes
    return changed


def status(path: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Addresses as the file's provider knows them; `up` is False when there is no head."""
    kinds = {name: kind for name, kind in tree["available_node_types"].items() if name != tree.get("head_node_type")}
    shown = {
        "name": tree["cluster_name"],
        "provider": f"ray up, {tree['provider'].get('type')}",
        "dashboard": None,
        "least": sum(kind.get("min_workers", 0) for kind in kinds.values()),
        "most": tree.get("max_workers", sum(kind.get("max_workers", 0) for kind in kinds.values())),
    }
    try:
        head = ray("get-head-ip", path).split()[-1]
    except ClusterError as problem:
        if "not found" not in str(problem).lower():
            raise
        return shown | {"up": False, "address": None, "nodes": []}
    found = ray("get-worker-ips", path).split()
    return shown | {"up": True, "address": head, "nodes": [{"name": ip, "ip": ip, "resources": {}} for ip in found]}


def ray(*words: str) -> str:
    """What a command of Ray's wrote. Raises ClusterError with its last words."""
    done = subprocess.run([*ray_program(), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ClusterError(f"`ray {' '.join(words)}` failed: {said[-1].strip() if said else f'exit {done.returncode}'}")
    return done.stdout
