"""`trebuchet eval`: base against the finished model, asked again as users open them: plain transformers, PEFT and bitsandbytes.

The same questions as around the run, with other metrics or more answers if wanted, and tasks of lm-evaluation-harness by name. The
result replaces evaluation.json and the record's `evaluation`. Left out: several processes; one opens both models, one after the
other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..launcher import record
from ..launcher.errors import RunError, UserError
from ..strategies import trained
from ..strategies.prepare import compute_dtype
from . import evaluate as asking
from . import harness
from .checkpoint import check
from .data import JudgedSet, PairSet, Units
from .data.prepare import row_tokens
from .finished import Finished
from .judge import Judge
from .metrics import find as find_metric
from .objectives import make as make_objective
from .reference import Precomputed, compute
from .scores import Subject


def evaluate(
    run: Finished, *, metrics: Sequence[str], tasks: Sequence[str], generations: int, checkpoint: int | None = None
) -> dict[str, Any]:
    """What stands in evaluation.json afterwards; of a checkpoint (its step) nothing is written. Raises UserError where there is nothing
    to ask or to ask with."""
    if run.data.eval is None or not len(run.data.eval):
        raise UserError(f"{run.folder.root} held no rows out (data.eval), so there is nothing to compare on.")
    asked = harness.find(tasks) if tasks else None
    judge = asker(run, run.data.eval, metrics, generations)
    found: list[Any] = []
    more: dict[str, Any] = {}
    score = run.plan.config.objective.name == "reward"  # a score model writes nothing
    prompts = [] if score else judge.held_out.prompts(judge.settings.generations)
    for tuned in (False, True):
        subject = opened(run, tuned=tuned)
        if tuned and checkpoint is not None:
            as_at(subject, run.folder.checkpoint(checkpoint))
        if not tuned:
            judge = with_reference(run, judge, subject)
        figures = judge.measure(subject, found[0] if tuned else None)
        if tuned and asked:
            more["harness"] = harness.run(asked, subject, run.tokenizer, run.chosen.micro_batch)
        figures["answers"] = asking.answers(subject, run.tokenizer, prompts, judge.settings.max_new_tokens)
        found.append(figures)
    before, after = found
    samples = [
        {"prompt": _text(run, prompt), "reference": _text(run, reference), "base": base, "tuned": tuned}
        for (prompt, reference), base, tuned in zip(prompts, before["answers"], after["answers"], strict=True)
    ]
    concluded = judge.conclude(before, after, samples) | more
    figures = {**concluded, "before": before, "after": after, "samples": samples}
    if checkpoint is not None:
        return figures
    record.write_atomically(run.folder.evaluation, json.dumps(figures, ensure_ascii=False, indent=1))
    record.update(run.folder, evaluation=concluded)
    return figures


def asker(run: Finished, units: Units, metrics: Sequence[str], generations: int) -> Judge:
    """The run's own questions, with other metrics and more answers where wanted."""
    config = run.plan.config
    more: dict[str, Any] = {"metrics": tuple(metrics) or config.evaluation.metrics}
    settings = config.evaluation.model_copy(update=more | ({"generations": generations} if generations else {}))
    for name in settings.metrics:
        find_metric(name)
    held_out = asking.HeldOut(
        units,
        room=row_tokens(config.data, config.objective),
        packing=config.data.packing,
        micro_batch=run.chosen.micro_batch,
        max_rows=settings.max_rows,
    )
    return Judge(
        tokenizer=run.tokenizer,
        pad_id=run.pad_id,
        settings=settings,
        objective=config.objective.name,
        rule=make_objective(config.objective),
        held_out=held_out,
    )


def with_reference(run: Finished, judge: Judge, base: Subject) -> Judge:
    """For an objective that compares with the untrained model: what that model says of the held-out pairs, kept with them. It is
    computed here whatever the run did (adapters off, a copy), which comes to the same numbers."""
    if run.plan.config.objective.reference_for(run.chosen.method) is None:
        return judge
    held = judge.held_out
    assert isinstance(held.units, PairSet | JudgedSet)
    layout: dict[str, Any] = {"packing": held.packing, "pad_id": run.pad_id, "micro_batch": held.micro_batch}
    held.units = replace(held.units, reference=compute(held.units, base, judge.rule, held.rows, **layout))
    judge.rule.reference = Precomputed()
    return judge


def opened(run: Finished, *, tuned: bool) -> Subject:
    """The base as it was trained on (quantized for qlora), or with what was trained."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    from ..strategies.score import add_score_places, small_scores

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
    score = config.objective.name == "reward"
    kind = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    options |= {"num_labels": 1} if score else {}
    net: Any = kind.from_pretrained(whole, use_safetensors=True, **options)
    if score:
        add_score_places(net)
        if whole == run.base:  # the head that training began with
            net.score.weight.data.copy_(small_scores(net, config.optimization.seed)["score.weight"])
    if tuned and chosen.method != "full":
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(run.folder.model))
    if chosen.method != "qlora":
        net = net.to(device)
    return Subject(model=net, inside=net, device=device)


def as_at(subject: Subject, checkpoint: Path) -> None:
    """The trained weights as a checkpoint has them. Raises RunError for one that is not whole, or of another model."""
    if problem := check(checkpoint):
        raise RunError(f"{checkpoint} cannot be read: {problem}.")
    try:
        trained.fill(checkpoint, dict(subject.inside.named_parameters()))
    except ValueError as other:
        raise RunError(f"{checkpoint} is not one of this model: {other}.") from None


def _text(run: Finished, ids: Sequence[int]) -> str:
    return str(run.tokenizer.decode(ids, skip_special_tokens=True)).strip()
