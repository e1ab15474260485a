"""Which strategy: pure arithmetic from (TrainConfig, ModelSpec, Cluster) to a Plan. No torch, no file, no clock.

The policy, in one place:

1. Method: the one of highest fidelity that fits, full then LoRA then QLoRA, unless the user named one, its hours or price are over
   the user's budget, or there are so few examples that full fine-tuning of a model of billions comes last (FEW_EXAMPLES). Weights
   that stream from host memory in every step come after all methods that do without: the bus costs more than NF4.
2. Where things are: all on the GPUs, then ZeRO-3 with the optimizer in host memory, then FSDP2 with the parameters there too.
3. Within these, of all that fits, the fastest by the formula of `strategies/throughput.py`: one device; on several DDP (a whole copy
   on each), or FSDP2 over all of them or over whole nodes, with copies between (HSDP, dp_replicate x dp_shard); activation
   checkpointing none, selective or full; the largest micro-batch that fits, a power of two that divides a rank's share of the global
   batch, up to MICRO_TOKENS. Of those within 15 % of the fastest, or without a speed (a CPU), the first in this order.

Each "no" keeps its two numbers: what was needed and what is usable. What fits is decided by `strategies/memory.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .advice import advice
from .cells import spell
from .cluster import Cluster
from .costing import Hardware, Layout, cost_and_time, precision
from .errors import ClusterError
from .fitting import fit
from .model_spec import ModelSpec
from .plan import Chosen, Plan, Rejected
from .schema import TrainConfig

METHODS = ("full", "lora", "qlora")
# From practice: fewer examples than this overfit, and the more parameters train the sooner; a small model trained whole has about as
# many parameters as the adapters of a large one. The first is the commonly published figure, the second was chosen.
FEW_EXAMPLES, LARGE_PARAMS = 500, 1e9
REFERENCES = {
    "adapters_off": "reference: the same base with its adapters off; no memory, one more forward pass a step",
    "precomputed": "reference: log-probabilities computed once before the first step; no memory, no time per step",
    "copy": "reference: a second copy of the model, frozen, which counts among the weights; one more forward pass a step",
}
# Derived: of 123 published peaks the formula's worst underestimate is 4.57 % (docs/accuracy.md), so a run planned up to 95.4 % of what
# PyTorch sees of the card would have held on every one of them. All 32 published runs that just fitted, or did not, are decided right
# with it (tests/strategies/test_memory_accuracy.py holds both).
GPU_MARGIN = 0.954
# Chosen: what is this close to the fastest counts as fast, and the simpler one comes first. The formula is off by up to 15 % on average
# (tests/strategies/test_throughput.py) and cannot tell such apart; 0.9 was tried first, and the value moved with an eye on the
# decisions that practice expects, so the decision table is no evidence for it.
NEARLY = 0.85
# Left to the operating system and the file cache when ranks run on the CPU.
CPU_MARGIN = 0.9


def make_plan(
    config: TrainConfig, model: ModelSpec, cluster: Cluster, *, examples: int | None = None, tokens: int | None = None
) -> Plan:
    """The plan; `feasible=False` with every rejection when nothing fits. Raises ClusterError for a cluster that cannot be planned on.

    `examples` and `tokens` are of one pass over the training rows, where known: for the advice, the hours and the price.
    """
    hardware = hardware_of(config, cluster)
    rejected: list[Rejected] = []
    chosen: Chosen | None = None
    reasons: list[str] = []
    few = few_examples(config, model, examples)
    cells = candidates(config, hardware, last=("full",) if few else ())
    for _, group in itertools.groupby(cells, key=lambda cell: (cell[0], cell[1].offload)):
        fits: list[Chosen] = []
        for method, layout in group:
            found = fit(config, model, hardware, method, layout)
            if isinstance(found, Rejected):
                rejected.append(found)
            fits += [timed(config, model, hardware, one, tokens) for one in found] if isinstance(found, list) else []
        dear = [no for one in fits if (no := over_budget(config, one))]
        fits = [one for one in fits if not over_budget(config, one)]
        rejected += dear[:1]
        if fits:
            chosen = first_of_the_fast(fits)
            reasons = explain(config, hardware, chosen, fits, few)
            break
    rejected = [one for one in leanest(rejected) if chosen is None or not same_cell(one, chosen)]
    notes = advice(config, model, hardware.ranks, chosen, examples)
    return Plan(
        feasible=chosen is not None,
        chosen=chosen,
        rejected=tuple(rejected),
        advice=tuple(notes),
        reasons=tuple(reasons),
        config=config,
        model=model,
        cluster=cluster,
    )


def timed(config: TrainConfig, model: ModelSpec, hardware: Hardware, one: Chosen, tokens: int | None) -> Chosen:
    time, cost = cost_and_time(config, model, hardware, one, tokens)
    return one.model_copy(update={"time": time, "cost": cost})


def few_examples(config: TrainConfig, model: ModelSpec, examples: int | None) -> str | None:
    """Why full fine-tuning comes last, None where it comes first."""
    if config.strategy.method != "auto" or examples is None or examples >= FEW_EXAMPLES or model.params < LARGE_PARAMS:
        return None
    few = f"{examples} examples for {model.params / 1e9:.1f} B parameters, and fewer than {FEW_EXAMPLES} overfit"
    return f"adapters before full fine-tuning: {few}"


def over_budget(config: TrainConfig, one: Chosen) -> Rejected | None:
    """The two numbers where hours or price are over what the user allows; None also where they are not known."""
    budget = config.budget
    for needed, most, unit in ((one.time.hours, budget.hours, "hours"), (one.cost, budget.cost, "cost")):
        if needed is not None and most is not None and needed > most:
            cell = Layout(one.parallel, one.offload, one.dp_replicate, one.dp_shard)
            said = f"{needed:,.1f} h" if unit == "hours" else f"a price of {needed:,.2f}"
            return Rejected(
                method=one.method,
                parallel=one.parallel,
                offload=one.offload,
                needed_gib=None,
                usable_gib=None,
                reason=f"{one.method}, {spell(cell)}: {said} needed, budget.{unit} is {most:g}",
            )
    return None


def first_of_the_fast(fits: list[Chosen]) -> Chosen:
    best = max(one.time.tokens_per_s or 0.0 for one in fits)
    return next(one for one in fits if (one.time.tokens_per_s or 0.0) >= best * NEARLY)


def same_cell(one: Rejected, chosen: Chosen) -> bool:
    """Whether `one` is another way to cut the layout that was chosen, which is no news to anyone."""
    return (one.method, one.parallel, one.offload) == (chosen.method, chosen.parallel, chosen.offload)


def leanest(rejected: list[Rejected]) -> list[Rejected]:
    """Of the ways to cut one layout into copies and shards the one that came nearest to fitting."""
    best: dict[tuple[str, str, str], Rejected] = {}
    for one in rejected:
        key = (one.method, one.parallel, one.offload)
        if key not in best or (one.needed_gib or 0.0) < (best[key].needed_gib or 0.0):
            best[key] = one
    return list(best.values())


def hardware_of(config: TrainConfig, cluster: Cluster) -> Hardware:
    if len(cluster.groups) > 1:
        kinds = ", ".join(f"{g.nodes} x {g.gpus_per_node} {g.gpu or 'CPU'}" for g in cluster.groups)
        with_gpus = next((g.gpu for g in cluster.groups if g.gpu), None)
        asked = cluster.name.startswith(("slurm:", "ray:")) and with_gpus
        how = f"name it, as in {cluster.name}:{with_gpus}" if asked else "write a cluster file with that group"
        raise ClusterError(f"{cluster.name} has several kinds of nodes ({kinds}); a run uses one: {how}.")
    group = cluster.groups[0]
    processes = config.cluster.processes
    if group.gpu is None:
        ranks = processes or 1
        usable = group.usable_host_gib * CPU_MARGIN / ranks
        return Hardware("cpu", ranks * group.nodes, ranks, round(usable, 2), group.usable_host_gib, group)
    per_node = processes or group.gpus_per_node
    if per_node > group.gpus_per_node:
        raise ClusterError(
            f"cluster.processes is {processes} and {cluster.name} has {group.gpus_per_node} GPUs a node; one rank uses one GPU."
        )
    return Hardware(
        "cuda",
        per_node * group.nodes,
        per_node,
        round(group.usable_gpu_gib * GPU_MARGIN, 2),
        group.usable_host_gib,
        group,
    )


def candidates(config: TrainConfig, hardware: Hardware, last: tuple[str, ...] = ()) -> list[tuple[str, Layout]]:
    """Every (method, layout) in the order of the policy, the methods in `last` behind the others."""
    named: tuple[str, ...] = METHODS if config.strategy.method == "auto" else (config.strategy.method,)
    methods = sorted(named, key=lambda method: method in last)
    every = [(method, layout) for method in methods for layout in layouts(config, hardware)]
    if config.strategy.offload == "auto":  # adapters have next to no optimizer states to move
        every = [(method, layout) for method, layout in every if method == "full" or layout.offload != "optimizer"]
    return sorted(
        every, key=lambda cell: cell[1].offload == "params" or (cell[0] != "full" and cell[1].offload != "none")
    )


def layouts(config: TrainConfig, hardware: Hardware) -> Iterator[Layout]:
    """Candidates in the order of the policy, cut to what the user asked for."""
    n = hardware.ranks
    want = config.strategy
    copies = 1 if want.dp_replicate == "auto" else want.dp_replicate
    every = [Layout("none", "none", 1, 1)] if n == 1 else [Layout("ddp", "none", n, 1)]
    if n > 1:
        every += [Layout("fsdp2", "none", copies, n // copies)]
    if want.dp_replicate == "auto":  # copies of whole nodes: gradients alone cross the network, and gathers stay within
        every += [Layout("fsdp2", "none", c, n // c) for c in whole_nodes(hardware)]
    if hardware.device == "cuda":
        every += [Layout("zero3", "optimizer", 1, n)] * (precision(config, hardware) != "fp16-mixed")  # cells.py
        every += [Layout("fsdp2", "params", copies, n // copies)]
    named = [x for x in every if want.parallel in ("auto", x.parallel) and want.offload in ("auto", x.offload)]
    if not named and want.parallel != "auto":  # what the user names is tried even where the policy would not
        cut = {"fsdp2": (copies, n // copies), "zero3": (1, n)}.get(want.parallel, (n, 1))
        named = [Layout(want.parallel, "none" if want.offload == "auto" else want.offload, *cut)]
    yield from named


def whole_nodes(hardware: Hardware) -> list[int]:
    """Numbers of copies whose shards fill whole nodes: the divisors of the number of nodes, above 1."""
    nodes = hardware.ranks // hardware.ranks_per_node
    return [c for c in range(2, nodes + 1) if nodes % c == 0 and hardware.ranks_per_node > 1]


def explain(config: TrainConfig, hardware: Hardware, chosen: Chosen, fits: list[Chosen], few: str | None) -> list[str]:
    """Why this one, in sentences with the numbers that decided."""
    named = config.strategy.method != "auto"
    order = "lora, qlora, full" if few else "full, lora, qlora"
    method = (
        f"{chosen.method}: you asked for it" if named else f"{chosen.method}: the first that fits in the order {order}"
    )
    memory = chosen.memory
    out = [f"{method}; {memory.process_gib:.1f} GiB needed, {memory.usable_gib:.1f} usable"]
    out += [few] if few else []
    out += spent(config, chosen)
    if chosen.parallel != "none":
        cut = f" {chosen.dp_replicate} x {chosen.dp_shard}" if chosen.dp_replicate > 1 and chosen.dp_shard > 1 else ""
        why = (
            "the only one that fits"
            if len(fits) == 1
            else f"the first of the fast among {len(fits)} combinations that fit"
        )
        if chosen.time.tokens_per_s is None and len(fits) > 1:
            why = f"the first of {len(fits)} combinations that fit"
        out.append(f"{chosen.parallel}{cut}: {why} with {chosen.method} on {hardware.ranks} ranks")
    rows = config.optimization.global_batch_size
    out.append(
        f"global batch {rows} rows = micro-batch {chosen.micro_batch} x accumulation {chosen.accumulation} x {chosen.ranks} "
        f"rank{'s' if chosen.ranks > 1 else ''}; activation checkpointing {chosen.checkpointing}"
    )
    if config.optimization.learning_rate == "auto":
        what = (
            chosen.method
            if config.objective.name in ("sft", "pretrain")
            else f"{config.objective.name} with {chosen.method}"
        )
        out.append(f"learning rate {chosen.learning_rate:g}: the usual one for {what}")
    reference = config.objective.reference_for(chosen.method)
    if reference is not None:
        out.append(REFERENCES[reference])
    return out


def spent(config: TrainConfig, chosen: Chosen) -> list[str]:
    """The budget beside what the run takes of it, in words; said too where that is not known."""
    out = []
    for name, most, needed in (
        ("hours", config.budget.hours, chosen.time.hours),
        ("cost", config.budget.cost, chosen.cost),
    ):
        if most is not None:
            taken = "not compared, because it is not known" if needed is None else f"{needed:,.2f} planned"
            out.append(f"budget.{name} {most:g}: {taken}")
    return out
