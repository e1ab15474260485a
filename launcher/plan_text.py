"""A plan as a page that is read in ten seconds: the chosen row first, then why, then each "no" with its two numbers."""

from __future__ import annotations

from .plan import Chosen, Plan

BAR = 24  # characters for the usable memory of one rank


def render(plan: Plan) -> str:
    lines = [headline(plan), ""]
    if plan.chosen:
        lines += [*table(plan.chosen), ""]
        lines += ["Why"] + [f"  {reason}" for reason in plan.reasons]
    else:
        lines.append("Nothing fits.")
    if plan.rejected:
        lines += ["", "Rejected"]
        width = max(len(f"{r.method} {r.parallel} {r.offload}") for r in plan.rejected)
        for r in plan.rejected:
            name = f"{r.method} {r.parallel}" + ("" if r.offload == "none" else f" +{r.offload}")
            if r.needed_gib is not None and r.usable_gib:
                lines.append(f"  {name:<{width}}  {bar(r.needed_gib, r.usable_gib)}  {r.reason}")
            else:
                lines.append(f"  {name:<{width}}  {r.reason}")
    if plan.advice:
        lines += ["", "Advice"] + [f"  {note}" for note in plan.advice]
    return "\n".join(lines) + "\n"


def headline(plan: Plan) -> str:
    """`Llama-3-8B (8.03 B parameters) on a100-80gb-8: 1 node x 8 A100-80GB`."""
    group = plan.cluster.groups[0]
    what = (
        f"{group.gpus_per_node} {group.gpu}"
        if group.gpu
        else f"{group.cores} CPU cores, {group.host_memory_gib:.0f} GiB"
    )
    nodes = f"{group.nodes} node{'s' if group.nodes > 1 else ''} x {what}"
    return f"{plan.model.name.rstrip('/').rsplit('/', 1)[-1]} ({count(plan.model.params)} parameters) on {plan.cluster.name}: {nodes}"


def table(chosen: Chosen) -> list[str]:
    memory = chosen.memory
    who = "rank" if chosen.device == "cpu" else "GPU"
    name = f"{chosen.method} {chosen.parallel}" + (
        "" if chosen.offload == "none" else f" +{chosen.offload} on the host"
    )
    rows = [
        f"> {name}  {bar(memory.process_gib, memory.usable_gib)}  {memory.process_gib:.1f} of {memory.usable_gib:.1f} GiB per {who}",
        f"  {chosen.precision}, {chosen.optimizer}, checkpointing {chosen.checkpointing}, micro-batch {chosen.micro_batch} x "
        f"accumulation {chosen.accumulation} x {chosen.ranks}, learning rate {chosen.learning_rate:g}",
        "  " + ", ".join(f"{part} {gib:.2f}" for part, gib in memory.components.items() if gib >= 0.01) + " GiB",
    ]
    time = chosen.time
    if time.tokens_per_s is not None and time.tokens_per_s_range:
        low, high = time.tokens_per_s_range
        line = f"  about {time.tokens_per_s:,.0f} tokens/s ({low:,.0f} to {high:,.0f})"
        if time.hours is not None and time.hours_range:
            line += f"; {time.hours:.1f} h ({time.hours_range[0]:.1f} to {time.hours_range[1]:.1f})"
        if chosen.cost is not None:
            line += f"; about {chosen.cost:,.2f} at the cluster file's price"
        rows.append(line)
    return rows


def bar(needed: float, usable: float) -> str:
    """`[######......]`, or full and marked where more is needed than there is."""
    share = needed / usable if usable else 2.0
    if share > 1:
        return "[" + "#" * BAR + ">"
    filled = round(share * BAR)
    return "[" + "#" * filled + "." * (BAR - filled) + "]"


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
