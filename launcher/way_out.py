"""What to do when nothing fits: the nearest thing that would, here; and the smallest cluster of the known types that would do.

Nearest, in this order and with as few changes as possible: what the user fixed is left to the planner again (micro-batch,
checkpointing, layout and offload, then the method, then the budget); then shorter rows; then the largest model of the same family
that fits. The smallest cluster is the one with the least GPU memory in all, over the shapes in cluster_configs/ and more nodes of
them. Everything is asked of the planner itself; nothing is guessed. Left out: a model of another family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cluster import Cluster, cluster_names, load_cluster
from .config import build_config
from .errors import TrebuchetError
from .model_spec import ModelSpec, load_model_spec, table
from .plan import Plan, WayOut
from .planner import make_plan
from .schema import TrainConfig

SHORTEST = 512
MOST_NODES = 64
NOT_A_SHAPE = ("local",)
# Between nodes of a shape that ships as one node: an assumption for the time, not for the memory.
INTER_NODE_GBPS = 25.0


def with_way_out(plan: Plan, tokens: int | None = None) -> Plan:
    """`plan` as it is when it is feasible, else with `nearest` and `smallest_cluster` filled in as far as there is any. `tokens` as
    the plan was made with: a budget is compared with the hours that they take."""
    if plan.feasible:
        return plan
    return plan.model_copy(
        update={"nearest": nearest(plan, tokens), "smallest_cluster": smallest_cluster(plan, tokens)}
    )


def nearest(plan: Plan, tokens: int | None = None) -> WayOut | None:
    for changes in relaxations(plan.config):
        found = _try(plan, changes, plan.model, plan.cluster, tokens)
        if found is not None:
            return found
    return _smaller_model(plan, tokens)


def relaxations(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Settings to change, fewest first: dotted key -> value."""
    strategy, optimization = config.strategy, config.optimization
    freed: dict[str, Any] = {}
    budget = {"budget.hours": config.budget.hours, "budget.cost": config.budget.cost}
    limits = {key: "null" for key, most in budget.items() if most is not None}
    for key, value in (
        ("optimization.micro_batch", optimization.micro_batch),
        ("strategy.checkpointing", strategy.checkpointing),
        ("strategy.parallel", strategy.parallel),
        ("strategy.dp_replicate", strategy.dp_replicate),
        ("strategy.offload", strategy.offload),
        ("strategy.method", strategy.method),
        ("strategy.kernels", "auto" if strategy.kernels == "on" else strategy.kernels),
    ):
        if value != "auto":
            yield {key: "auto"}
            freed[key] = "auto"
            yield dict(freed)
    if limits:
        yield dict(limits)
        freed |= limits
        yield dict(freed)
    length = 2 ** ((config.data.max_length - 1).bit_length() - 1)
    while length >= SHORTEST:
        yield {"data.max_length": length}
        if freed:
            yield {**freed, "data.max_length": length}
        length //= 2


def smallest_cluster(plan: Plan, tokens: int | None = None) -> WayOut | None:
    """The same run, nothing changed, on the shape with the least GPU memory that holds it."""
    for cluster in sorted(shapes(), key=lambda one: (_memory_gib(one), one.groups[0].nodes, one.name)):
        found = _try(plan, {}, plan.model, cluster, tokens)
        if found is not None:
            return found
    return None


def shapes() -> Iterator[Cluster]:
    """The shipped clusters with GPUs, once for each kind of node, on 1, 2, 4, … nodes."""
    seen = set()
    for name in cluster_names():
        if name in NOT_A_SHAPE:
            continue
        cluster = load_cluster(name)
        group = cluster.groups[0]
        key = (group.gpu, group.gpus_per_node)
        if group.gpu is None or "template" in name or cluster.scheduler == "ray" or key in seen:
            continue
        seen.add(key)
        most = MOST_NODES if group.gpus_per_node >= 8 else 1
        nodes = 1
        while nodes <= most:
            link = group.inter_node_gbps or (INTER_NODE_GBPS if nodes > 1 else None)
            named = name if nodes == group.nodes else f"{nodes} nodes of {name}"
            changed = group.model_copy(update={"nodes": nodes, "inter_node_gbps": link})
            yield cluster.model_copy(update={"name": named, "groups": (changed,)})
            nodes *= 2


def _memory_gib(cluster: Cluster) -> float:
    return sum(group.gpus * (group.gpu_memory_gib or 0.0) for group in cluster.groups)


def _smaller_model(plan: Plan, tokens: int | None) -> WayOut | None:
    """The largest model of the same family in the table that this cluster holds with the user's own settings."""
    names: dict[int, str] = {}
    for name, row in table().items():
        if "/" in name and row["model_type"] == plan.model.model_type:
            spec = load_model_spec(plan.config.model.model_copy(update={"name": name}), offline=True)
            names.setdefault(spec.params, name)
    for params in sorted((p for p in names if p < plan.model.params), reverse=True):
        spec = load_model_spec(plan.config.model.model_copy(update={"name": names[params]}), offline=True)
        found = _try(plan, {"model.name": names[params]}, spec, plan.cluster, tokens)
        if found is not None:
            return found
    return None


def _try(plan: Plan, changes: dict[str, Any], model: ModelSpec, cluster: Cluster, tokens: int | None) -> WayOut | None:
    try:
        config = build_config(plan.config.model_dump(mode="json"), [f"{key}={value}" for key, value in changes.items()])
        if "strategy.method" not in changes and cluster.name != plan.cluster.name:
            config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"processes": None})})
        chosen = make_plan(config, model, cluster, tokens=tokens).chosen
    except TrebuchetError:
        return None
    if chosen is None:
        return None
    return WayOut(
        set=changes,
        cluster=cluster.name,
        gpus=chosen.gpus,
        method=chosen.method,
        parallel=chosen.parallel,
        offload=chosen.offload,
        needed_gib=chosen.memory.process_gib,
        usable_gib=chosen.memory.usable_gib,
    )
