"""`trebuchet eval`: base against the finished model, asked again as users open them: plain transformers, PEFT and bitsandbytes.

The same questions as around the run, with other metrics or more answers if wanted, and tasks of lm-evaluation-harness by name. The
result replaces evaluation.json and the record's `evaluation`. Left out: objectives over pairs, whose numbers are those of their run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ..launcher import record
from ..launcher.errors import UserError
from ..strategies.prepare import compute_dtype
from . import evaluate as asking
from .data.prepare import row_tokens
from .finished import Finished
from .judge import ONE_TOKEN_LOSS, Judge
from .scores import Subject


def evaluate(run: Finished, *, metrics: Sequence[str], tasks: Sequence[str], generations: int) -> dict[str, Any]:
    """What stands in evaluation.json afterwards. Raises UserError where there is nothing to ask or to ask with."""
    config = run.plan.config
    if config.objective.name not in ONE_TOKEN_LOSS:
        raise UserError(
            f"objective {config.objective.name} is evaluated around the run; `trebuchet eval` compares sft and pretrain."
        )
    if run.data.eval is None or not len(run.data.eval):
        raise UserError(f"{run.folder.root} held no rows out (data.eval), so there is nothing to compare on.")
    more: dict[str, Any] = {"metrics": tuple(metrics) or config.evaluation.metrics}
    settings = config.evaluation.model_copy(update=more | ({"generations": generations} if generations else {}))
    held_out = asking.HeldOut(
        run.data.eval,
        room=row_tokens(config.data, config.objective),
        packing=config.data.packing,
        micro_batch=run.chosen.micro_batch,
        max_rows=settings.max_rows,
    )
    judge = Judge(
        tokenizer=run.tokenizer,
        pad_id=run.pad_id,
        settings=settings,
        objective=config.objective.name,
        held_out=held_out,
    )
    prompts = held_out.prompts(settings.generations)
    found: list[dict[str, Any]] = []
    for tuned in (False, True):
        subject = opened(run, tuned=tuned)
        figures = judge.of(subject)
        figures["answers"] = asking.answers(subject, run.tokenizer, prompts, settings.max_new_tokens)
        if judge.general:
            said = found[0]["said"] if tuned else judge.base_says(subject)
            figures |= {"said": said, "forgetting": judge.remembers(subject, said)}
        found.append(figures)
    before, after = found
    samples = [
        {"prompt": _text(run, prompt), "reference": _text(run, reference), "base": base, "tuned": tuned}
        for (prompt, reference), base, tuned in zip(prompts, before["answers"], after["answers"], strict=True)
    ]
    concluded = judge.conclude(before, after, samples)
    if tasks:
        concluded["harness"] = harness(run, tasks)
    figures = {**concluded, "before": before, "after": after, "samples": samples}
    record.write_atomically(run.folder.evaluation, json.dumps(figures, ensure_ascii=False, indent=1))
    record.update(run.folder, evaluation=concluded)
    return figures


def opened(run: Finished, *, tuned: bool) -> Subject:
    """The base as it was trained on (quantized for qlora), or with what was trained."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config, chosen = run.plan.config, run.chosen
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(chosen.precision)
    options: dict[str, Any] = {
        "dtype": dtype,
        "local_files_only": True,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if chosen.method == "qlora":
        quant = config.strategy.quant
        options["device_map"] = {"": device}
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quant.type == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant.type,
                bnb_4bit_use_double_quant=quant.double,
                bnb_4bit_compute_dtype=dtype,
            )
        )
    whole = run.folder.model if tuned and chosen.method == "full" else run.base
    net: Any = AutoModelForCausalLM.from_pretrained(whole, use_safetensors=True, **options)
    if tuned and chosen.method != "full":
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(run.folder.model))
    if chosen.method != "qlora":
        net = net.to(device)
    return Subject(model=net, inside=net, device=device)


def harness(run: Finished, tasks: Sequence[str]) -> dict[str, float]:
    """`task/metric` -> value, of the saved model, by lm-evaluation-harness."""
    try:
        import lm_eval
    except ImportError:
        raise UserError("--harness needs a package: `pip install 'trebuchet[harness]'`.") from None
    adapter = run.chosen.method != "full"
    arguments = f"pretrained={run.base},peft={run.folder.model}" if adapter else f"pretrained={run.folder.model}"
    found = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=list(tasks))
    return {
        f"{task}/{name}": float(value)
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }


def _text(run: Finished, ids: Sequence[int]) -> str:
    return str(run.tokenizer.decode(ids, skip_special_tokens=True)).strip()
