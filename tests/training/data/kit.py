"""Chat templates of every kind that the mask must cope with, rows, and a short way to look at what came out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from trebuchet.training.data import Prepared

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The end of the text after the last turn only, as in Phi-3: incremental rendering cannot follow several turns.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

# Two blocks for one turn, as in TRL's version of Phi-3's.
TWO_BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)

# Empty thinking before the last answer only, as in Qwen 3.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN_STYLE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

DROPS_LAST_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}\n{% endfor %}"
)

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)

LOSES_CONTENT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def wrap(
    backend: Tokenizer, template: str | None, *, eos: str = "<|im_end|>", pad: str = "<|pad|>"
) -> PreTrainedTokenizerFast:
    out = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()), bos_token="<|bos|>", eos_token=eos, pad_token=pad
    )
    out.chat_template = template
    return out


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A messages row: user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages}


def chats(count: int) -> list[dict[str, Any]]:
    return [chat(f"Question {i}?", f"Answer {i}.") for i in range(count)]


def trained_texts(prepared: Prepared, tokenizer: Any, i: int = 0) -> list[str]:
    """The text of each run of trained tokens of a sample."""
    ids, mask = prepared.train.sample(i)
    runs: list[list[int]] = []
    for position, (token, on) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if on and (position == 0 or not mask[position - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]
