"""A plan as a page that is read in ten seconds, in 80 columns: the chosen row first, then why, then each "no" with the number that
rejected it, and when nothing fits what would."""

from __future__ import annotations

import math
import textwrap

from .plan import Chosen, Plan, Rejected, WayOut

BAR = 16  # characters for the usable memory of one rank
WIDTH = 80


def render(plan: Plan) -> str:
    lines = [*wrapped(headline(plan), "", ""), ""]
    if plan.chosen:
        lines += [*table(plan.chosen), "", "Why"]
        lines += [line for reason in plan.reasons for line in wrapped(reason)]
    else:
        lines.append("Nothing fits.")
        lines += way_out(plan)
    if plan.rejected:
        lines += ["", "Rejected"] + [line for one in plan.rejected for line in row(one)]
    if plan.advice:
        lines += ["", "Advice"] + [line for note in plan.advice for line in wrapped(note)]
    return "\n".join(lines) + "\n"


def wrapped(text: str, first: str = "  ", later: str = "    ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def row(one: Rejected) -> list[str]:
    """One rejected cell: its bar and its two numbers, or the sentence that rules it out."""
    name = f"{one.method} {one.parallel}" + ("" if one.offload == "none" else f" +{one.offload}")
    if one.needed_gib is None or one.usable_gib is None:
        return wrapped(f"{name:<24}{one.reason}", later=" " * 26)
    where = "GiB on the host" if "host memory on a node" in one.reason else "GiB"
    return [
        f"  {name:<22}  {bar(one.needed_gib, one.usable_gib)}  {one.needed_gib:,.1f} of {one.usable_gib:,.1f} {where}"
    ]


def way_out(plan: Plan) -> list[str]:
    lines = []
    for title, found in (("nearest that fits", plan.nearest), ("smallest cluster", plan.smallest_cluster)):
        lines += wrapped(f"{title + ':':<18} {words(found)}", later=" " * 21)
    return lines


def words(found: WayOut | None) -> str:
    if found is None:
        return "none that this version knows"
    with_what = f"{found.method} {found.parallel}" + ("" if found.offload == "none" else f" +{found.offload}")
    need = f"{with_what}, {found.needed_gib:.1f} of {found.usable_gib:.1f} GiB"
    if not found.set:
        return f"{found.cluster}, {found.gpus} GPUs: {need}"
    return " ".join(f"--set {key}={value}" for key, value in found.set.items()) + f": {need}"


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
    name = f"{chosen.method} {chosen.parallel}" + ("" if chosen.offload == "none" else f" +{chosen.offload}")
    rows = [
        f"> {name:<22}  {bar(memory.process_gib, memory.usable_gib)}  {memory.process_gib:.1f} of {memory.usable_gib:.1f} GiB per {who}",
        *wrapped(
            f"{chosen.precision}, {chosen.optimizer}, checkpointing {chosen.checkpointing}, micro-batch {chosen.micro_batch} x "
            f"accumulation {chosen.accumulation} x {chosen.ranks}, learning rate {chosen.learning_rate:g}"
        ),
        *wrapped(", ".join(f"{part} {gib:.2f}" for part, gib in memory.components.items() if gib >= 0.01) + " GiB"),
    ]
    if chosen.device == "cuda":
        rows.append(f"  host memory {memory.host_gib:.0f} GiB on each node")
    time = chosen.time
    if time.tokens_per_s is not None and time.tokens_per_s_range:
        low, high = time.tokens_per_s_range
        line = f"about {time.tokens_per_s:,.0f} tokens/s ({low:,.0f} to {high:,.0f})"
        if time.hours is not None and time.hours_range:
            line += f"; {time.hours:.1f} h ({time.hours_range[0]:.1f} to {time.hours_range[1]:.1f})"
        if chosen.cost is not None:
            line += f"; about {chosen.cost:,.2f} at the cluster file's price"
        rows += wrapped(line)
        if time.hours_range is not None:
            rows += wrapped(
                f"time limit: --time {limit(time.hours_range[1])} holds the slow end of that and a fifth more"
            )
    return rows


def bar(needed: float, usable: float) -> str:
    """`[######......]`, or full and marked where more is needed than there is."""
    share = needed / usable if usable else 2.0
    if share > 1:
        return "[" + "#" * BAR + ">"
    filled = round(share * BAR)
    return "[" + "#" * filled + "." * (BAR - filled) + "]"


def limit(hours: float) -> str:
    """`D-HH:MM:00` or `HH:MM:00` as sbatch takes it: `hours` and a fifth more, and ten minutes to load and save, in quarters."""
    quarters = math.ceil((hours * 1.2 + 1 / 6) * 4)
    days, rest = divmod(quarters, 96)
    return (f"{days}-" if days else "") + f"{rest // 4:02}:{rest % 4 * 15:02}:00"


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
