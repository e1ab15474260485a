"""Writes docs/planner.svg from the planner itself: what one GPU holds for an 8B model, by method and layout.

    python docs/planner_figure.py

A test compares the file with what this makes.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from trebuchet.launcher.cluster import load_cluster
from trebuchet.launcher.config import build_config
from trebuchet.launcher.costing import Layout, memory, request
from trebuchet.launcher.model_spec import load_model_spec
from trebuchet.launcher.planner import hardware_of
from trebuchet.strategies.memory import estimate

FILE = Path(__file__).with_name("planner.svg")
MODEL = "meta-llama/Llama-3.1-8B"
ROWS = [  # label, cluster, method, parallel, dp_replicate, dp_shard, checkpointing
    ("full, DDP on 8", "a100-80gb-8", "full", "ddp", 8, 1, "full"),
    ("full, FSDP2 on 8", "a100-80gb-8", "full", "fsdp2", 1, 8, "full"),
    ("full, FSDP2 on 8, no checkpointing", "a100-80gb-8", "full", "fsdp2", 1, 8, "none"),
    ("LoRA, one GPU", "a100-80gb-1", "lora", "none", 1, 1, "full"),
    ("LoRA, one GPU, no checkpointing", "a100-80gb-1", "lora", "none", 1, 1, "none"),
    ("QLoRA, one GPU", "a100-80gb-1", "qlora", "none", 1, 1, "full"),
]
COLOURS = {
    "weights": "#3b6ea5", "adapters": "#7aa6d6", "gradients": "#c8553d", "optimizer": "#e39b52", "gathered": "#6b4e9b",
    "buffers": "#9a9a9a", "activations": "#4f9d69", "logits": "#a3c96b", "step_temporary": "#d9b3a5", "holes_and_context": "#d0d0d0",
}  # fmt: skip
LEFT, WIDTH, HEIGHT, TOP, STEP = 232, 560, 22, 34, 34
SCALE_GIB = 140.0


def figure() -> str:
    x = lambda gib: LEFT + gib / SCALE_GIB * WIDTH  # noqa: E731
    bottom = TOP + STEP * len(ROWS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{bottom + 72}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{LEFT + WIDTH + 60}" height="{bottom + 72}" fill="white"/>',
        '<text x="8" y="18" font-size="13">Llama 3.1 8B, rows of 2,048 tokens, micro-batch 2: GiB of one GPU at its peak</text>',
    ]
    for gib in range(0, 141, 20):
        parts.append(f'<line x1="{x(gib):.1f}" y1="{TOP - 6}" x2="{x(gib):.1f}" y2="{bottom}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x(gib):.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{gib}</text>')
    used: list[str] = []
    for i, (label, *cell) in enumerate(ROWS):
        y, at = TOP + STEP * i, 0.0
        total, components = _measured(*cell)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        for name, gib in components.items():
            used += [name] if name not in used else []
            parts.append(
                f'<rect x="{x(at):.1f}" y="{y}" width="{x(at + gib) - x(at):.1f}" height="{HEIGHT}" fill="{COLOURS[name]}"/>'
            )
            at += gib
        parts.append(f'<text x="{x(total) + 5:.1f}" y="{y + 15}">{total:.1f}</text>')
    usable = hardware_of(_config(), load_cluster("a100-80gb-8")).usable_gib
    parts.append(
        f'<line x1="{x(usable):.1f}" y1="{TOP - 8}" x2="{x(usable):.1f}" y2="{bottom}" stroke="black" stroke-dasharray="4 3"/>'
        f'<text x="{x(usable) + 4:.1f}" y="{bottom - 2}" font-size="11">usable of an A100 80 GB: {usable:.1f}</text>'
    )
    for i, name in enumerate(used):
        left, y = 12 + i % 5 * 165, bottom + 32 + i // 5 * 18
        parts.append(f'<rect x="{left}" y="{y}" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{left + 17}" y="{y + 10}">{name.replace("_", " ")}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _config():
    return build_config({"model": MODEL, "data": "train.jsonl", "optimization": {"micro_batch": 2}})


def _measured(cluster: str, method: str, parallel: str, replicate: int, shard: int, checkpointing: str):
    config = _config()
    hardware, layout = hardware_of(config, load_cluster(cluster)), Layout(parallel, "none", replicate, shard)
    asked = request(config, load_model_spec(config.model), hardware, method, layout, checkpointing, 2)
    found = memory(hardware, estimate(asked))
    return found.process_gib, found.components


if __name__ == "__main__":
    FILE.write_text(figure(), encoding="utf-8")
