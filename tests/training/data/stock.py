"""Chat templates in the form of the stock ones, written for these tests, with the special tokens they need.

Each does what makes its family hard for a mask: a default system prompt, answers trimmed, a last turn that is rendered in
another way than the ones before, thinking dropped from earlier turns, a generation prompt that opens a thought.
"""

from __future__ import annotations

from dataclasses import dataclass

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _default_system(text: str) -> str:
    return "{% if messages[0].role != 'system' %}<|im_start|>system\n" + text + "<|im_end|>\n{% endif %}" + _CHATML


_LLAMA = (
    "{{ bos_token }}{% set first = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "{{ first }}<|eot_id|>{% for m in messages if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Thinking is written before the answer to the last question only, empty where there is none.
_QWEN3 = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.asked and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA_TURNS = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set first, turns = '', messages %}" + _GEMMA_TURNS
)
_GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first, turns = messages[0].content + '\n\n', messages[1:] %}"
    "{% else %}{% set first, turns = '', messages %}{% endif %}" + _GEMMA_TURNS
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
# The last answer ends in <|return|>, the ones before in <|end|>; a thought is a message of its own before the last answer.
_GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT.\nReasoning: medium<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% else %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def _deepseek(prompt: str) -> str:
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>" + prompt + "{% endif %}"
    )


@dataclass(frozen=True, kw_only=True)
class Stock:
    """`ends`: the token after an answer, and the one after the last where that differs. `bos` where the template writes one.
    `lead`: what stands between the generation prompt and an answer, so that the model has to write it."""

    template: str
    specials: tuple[str, ...]
    ends: tuple[str, str]
    eos: str
    bos: str | None = None
    system: bool = True
    lead: str = ""


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|startoftext|>")


def _chatml(template: str, **more: object) -> Stock:
    return Stock(template=template, specials=_IM, ends=("<|im_end|>",) * 2, eos="<|im_end|>", **more)  # type: ignore[arg-type]


STOCK = {
    "Llama 3.1 and 3.3": Stock(
        template=_LLAMA, specials=_LLAMA_TOKENS, ends=("<|eot_id|>",) * 2, eos="<|eot_id|>", bos="<|begin_of_text|>"
    ),
    "Qwen 2.5": _chatml(_default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    "Qwen 3": _chatml(_QWEN3),
    "Gemma 2": Stock(
        template=_GEMMA2, specials=_GEMMA_TOKENS, ends=("<end_of_turn>",) * 2, eos="<eos>", bos="<bos>", system=False
    ),
    "Gemma 3": Stock(template=_GEMMA3, specials=_GEMMA_TOKENS, ends=("<end_of_turn>",) * 2, eos="<eos>", bos="<bos>"),
    "Mistral": Stock(
        template=_MISTRAL, specials=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        ends=("</s>",) * 2, eos="</s>", bos="<s>", lead=" ",
    ),
    "Phi-3": Stock(
        template=_PHI3, specials=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        ends=("<|end|>",) * 2, eos="<|endoftext|>",
    ),
    "Phi-4": Stock(template=_PHI4, specials=(*_IM, "<|im_sep|>"), ends=("<|im_end|>",) * 2, eos="<|im_end|>"),
    "SmolLM2": _chatml(_default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
    "gpt-oss": Stock(template=_GPT_OSS, specials=_HARMONY, ends=("<|end|>", "<|return|>"), eos="<|return|>"),
    "DeepSeek V3": Stock(
        template=_deepseek(""), specials=_DEEPSEEK_TOKENS, ends=("<｜end▁of▁sentence｜>",) * 2,
        eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
    ),
    "DeepSeek R1": Stock(
        template=_deepseek("<think>\n"), specials=_DEEPSEEK_TOKENS, ends=("<｜end▁of▁sentence｜>",) * 2,
        eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
    ),
    "ChatML": _chatml(_CHATML),
}  # fmt: skip
