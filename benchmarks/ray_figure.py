"""What benchmarks/ray.py needs beside its measurements: the nodes over time as a figure, and a small model with rows for it."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from trebuchet.launcher.errors import ClusterError, SchedulerRefused
from trebuchet.ray_cluster import clusters
from trebuchet.ray_cluster.state import cluster_folder

LOOK_S = 0.25
LEFT, WIDTH, HEIGHT, TOP, GAP = 48, 640, 90, 46, 88
ROWS, HELD_OUT = 12_000, 64
WORDS = ["north", "river", "stone", "amber", "willow", "copper", "harbour", "lantern", "meadow", "thunder"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


@dataclass
class Watched:
    title: str
    times_s: list[float] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)


class Nodes:
    """Living nodes of a cluster, asked four times a second while a measurement runs."""

    def __init__(self) -> None:
        self.panels: list[Watched] = []
        self.began = 0.0

    @contextlib.contextmanager
    def of(self, name: str, title: str) -> Iterator[None]:
        panel, over = Watched(title), threading.Event()
        self.panels.append(panel)
        self.began = time.time()

        def look() -> None:
            with contextlib.suppress(ClusterError, SchedulerRefused):
                count = len(clusters.nodes(cluster_folder(name)))
                panel.times_s.append(time.time() - self.began)
                panel.nodes.append(count)

        def watch() -> None:
            while not over.wait(LOOK_S):
                look()
            look()  # what is waited for last is drawn too

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def mark(self, text: str) -> None:
        self.panels[-1].marks.append((time.time() - self.began, text))

    def svg(self) -> str:
        height = TOP + len(self.panels) * (HEIGHT + GAP)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 24}" height="{height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{LEFT + WIDTH + 24}" height="{height}" fill="white"/>',
        ]
        for i, panel in enumerate(self.panels):
            parts += drawn(panel, TOP + i * (HEIGHT + GAP))
        return "\n".join([*parts, "</svg>", ""])


def drawn(panel: Watched, top: int) -> list[str]:
    """A step line of the nodes over seconds, with a dashed line at each mark."""
    span, most = max(panel.times_s[-1], 1.0), max(3, *panel.nodes)
    x = lambda second: LEFT + second / span * WIDTH  # noqa: E731
    y = lambda count: top + HEIGHT - count / most * HEIGHT  # noqa: E731
    parts = [f'<text x="{LEFT}" y="{top - 24}" font-size="13">{escape(panel.title)}</text>']
    for count in range(most + 1):
        parts.append(f'<line x1="{LEFT}" y1="{y(count)}" x2="{LEFT + WIDTH}" y2="{y(count)}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(count) + 4}" text-anchor="end" fill="#555">{count}</text>')
    step = next(s for s in (5, 10, 20, 30, 60, 120, 300) if span / s <= 12)
    for second in range(0, int(span) + 1, step):
        parts.append(
            f'<text x="{x(second):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle" fill="#555">{second} s</text>'
        )
    points, before = [], None
    for at, count in zip(panel.times_s, panel.nodes, strict=True):
        if count != before:
            points += [f"{x(at):.1f},{y(before if before is not None else count):.1f}", f"{x(at):.1f},{y(count):.1f}"]
            before = count
    points.append(f"{x(panel.times_s[-1]):.1f},{y(panel.nodes[-1]):.1f}")
    following = [x(at) for at, _ in panel.marks[1:]] + [math.inf]
    for (at, text), after in zip(panel.marks, following, strict=True):
        parts.append(
            f'<line x1="{x(at):.1f}" y1="{top - 14}" x2="{x(at):.1f}" y2="{top + HEIGHT}" stroke="#c8553d" stroke-dasharray="4 3"/>'
        )
        # Left of its line where the next one is too near for it to stand on the right.
        anchor, where = ("end", x(at) - 4) if after - x(at) < 7 * len(text) else ("start", x(at) + 4)
        parts.append(f'<text x="{where:.1f}" y="{top - 6}" text-anchor="{anchor}" fill="#c8553d">{escape(text)}</text>')
    parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#3b6ea5" stroke-width="2"/>')
    parts.append(f'<text x="{LEFT}" y="{top + HEIGHT + 34}" fill="#555">nodes over time</text>')
    return parts


def materials(work: Path) -> tuple[Path, Path, Path]:
    """A Llama of 4 layers and hidden size 128 with a byte-level tokenizer, and conversations of about 60 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = []
    for i in range(ROWS + HELD_OUT):
        words = [WORDS[(i * 7 + j * (i % 9 + 1)) % len(WORDS)] for j in range(4 + i % 9)]
        turns = [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": " ".join(reversed(words))},
        ]
        rows.append(json.dumps({"messages": turns}) + "\n")
    train, held_out, folder = work / "train.jsonl", work / "eval.jsonl", work / "model"
    train.write_text("".join(rows[:ROWS]))
    held_out.write_text("".join(rows[ROWS:]))
    if folder.exists():
        return folder, train, held_out
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=256, tie_word_embeddings=True, dtype="float32", bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder, train, held_out
