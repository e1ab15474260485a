"""`trebuchet cluster`: the verbs' words. What they do is in clusters.py."""

from __future__ import annotations

import json
from typing import Any

from ..launcher.cluster import load_cluster
from ..launcher.errors import UserError
from . import clusters, launcher_file


def act(action: str, cluster: str, nodes: int | None, *, at_most: bool, as_json: bool) -> str:
    """Does it, and returns what to print. Raises UserError for a number that is missing or has no place."""
    if (
        (action == "resize") != (nodes is not None)
        or (nodes is not None and nodes < 0)
        or (at_most and action != "resize")
    ):
        raise UserError(
            "`trebuchet cluster resize NAME NODES [--at-most]` takes a number of nodes; up, down and status take none."
        )
    if (tree := launcher_file.read(cluster)) is not None:
        found, text = of_ray_s_launcher(action, cluster, tree, nodes, at_most=at_most)
        return json.dumps(found, indent=1) if as_json else text
    known = load_cluster(cluster)
    if action == "up":
        facts = clusters.up(known, lambda line: None)
        found = {"name": known.name, "address": facts["address"], "dashboard": facts["dashboard"]}
        text = f"{known.name} is up at {facts['address']}; jobs go to {facts['dashboard']}"
    elif action in ("down", "resize") and clusters.of_ray(known).provider == "existing":
        raise UserError(f"{known.name} is kept by others (ray.provider: existing); they resize and end it.")
    elif action == "down":
        clusters.down(known.name, lambda line: None)
        found, text = {"name": known.name, "up": False}, f"{known.name} is down; nothing of it is left"
    elif action == "resize":
        assert nodes is not None
        clusters.resize(known.name, nodes, at_most=at_most)
        found = {"name": known.name, "most": nodes, "least": 0 if at_most else nodes}
        text = (
            f"{known.name}: {'at most' if at_most else 'exactly'} {nodes} node{'' if nodes == 1 else 's'} from now on"
        )
    else:
        found = clusters.status(known)
        text = status_text(found)
    return json.dumps(found, indent=1) if as_json else text


def of_ray_s_launcher(
    action: str, path: str, tree: dict[str, Any], nodes: int | None, *, at_most: bool
) -> tuple[dict[str, Any], str]:
    """The same verbs for a file of `ray up`, and their words."""
    name = tree["cluster_name"]
    if action == "down":
        launcher_file.down(path)
        return {"name": name, "up": False}, f"{name} is down"
    if action == "up":
        launcher_file.up(path)
    elif action == "resize":
        assert nodes is not None
        launcher_file.resize(path, tree, nodes, at_most=at_most)
        found = {"name": name, "most": nodes, "least": 0 if at_most else nodes}
        return found, f"{name}: {'at most' if at_most else 'exactly'} {nodes} nodes from now on"
    found = launcher_file.status(path, tree)
    return found, status_text(found)


def status_text(found: dict[str, Any]) -> str:
    state = "up" if found["up"] else "not answering"
    lines = [f"{found['name']}  {state}  {found['provider']}  {found['dashboard'] or ''}".rstrip()]
    allowed = "" if found["most"] is None else f", {found['least']} to {found['most']} allowed"
    lines.append(f"  {len(found['nodes'])} nodes{allowed}")
    for node in found["nodes"]:
        parts = [f"{node['resources'].get(key, 0):.0f} {key}" for key in ("CPU", "GPU") if node["resources"].get(key)]
        lines.append(f"  {node['name']}  {node['ip']}  {', '.join(parts)}")
    return "\n".join(lines)
