"""`trebuchet cluster up|resize|down|status NAME`: the part of the command line that is about Ray clusters."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_cluster(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """`verb(name, function, text, json=…)` makes a subparser."""
    cluster = verb("cluster", _cluster, "Ray clusters: start, resize, end, look at", json=True)
    cluster.add_argument("action", choices=("up", "resize", "down", "status"))
    cluster.add_argument("cluster", metavar="NAME|FILE", help="a name in cluster_configs/ or a cluster YAML")
    cluster.add_argument("nodes", metavar="NODES", type=int, nargs="?", help="resize: exactly so many nodes")
    cluster.add_argument("--at-most", action="store_true", help="resize: up to NODES, started when work asks for them")


def _cluster(options: argparse.Namespace) -> int:
    from ..ray_cluster import clusters_text

    print(
        clusters_text.act(options.action, options.cluster, options.nodes, at_most=options.at_most, as_json=options.json)
    )
    return 0
