"""One attempt of one run, in order: tokenizer, data, model, evaluation, loop, evaluation, export.

This is the only place that knows the order. Each part is a function of another file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..launcher import record
from ..launcher.errors import JobFailed
from ..strategies.layouts import LayoutError, place
from ..strategies.prepare import Prepared, compute_dtype, prepare, prepare_frozen
from . import evaluate, isolation, load
from .adapter import digests
from .data import Order, Units
from .data.prepare import row_tokens
from .export import export
from .judge import Judge
from .loop import Loop
from .objectives import make as make_objective
from .optim import make_optimizer, make_schedule
from .phases import OTHER
from .reference import AdaptersOff, Copy, Precomputed, precompute
from .runtime import Runtime
from .scores import of_stepper
from .step import Stepper


class Session:
    def __init__(self, runtime: Runtime):
        assert runtime.plan.chosen is not None
        self.runtime, self.plan, self.config, self.chosen = (
            runtime,
            runtime.plan,
            runtime.plan.config,
            runtime.plan.chosen,
        )
        self.base: Path = load.model_folder(self.config.model, self.plan.model)
        self.tokenizer = load.load_tokenizer(self.base, self.config.model)
        self.data = load.prepared_data(self.config, self.plan.model, self.tokenizer)
        if self.data.chat_template:  # the model is saved with the template it was trained with
            self.tokenizer.chat_template = self.data.chat_template

    refusal: str | None = None  # of rank 0: why a run that reached its end fails all the same

    def run(self, until: int | None = None) -> bool:
        try:
            return self.attempt(until)
        except LayoutError as problem:
            raise JobFailed(str(problem)) from None

    def attempt(self, until: int | None = None) -> bool:
        self.runtime.memory.enter("load")
        prepared = self.prepared()
        self.report(prepared)
        # Adapters had to start equal on all ranks; dropout masks from here on must not be.
        torch.manual_seed(self.config.optimization.seed + self.runtime.rank)
        self.runtime.loads_on()
        loop = self.loop(prepared)
        self.runtime.loads_on()
        isolation.require(loop.stepper, self.plan, self.pad_id)
        done = loop.resume()
        self.runtime.loads_on(over=True)
        before = loop.before = self.before(loop, done)
        if not loop.run(done, until):
            return False
        loop.take_best()
        after = self.measure(loop, before)
        if self.runtime.main:
            self.finish(loop, before, after)
        main, layout = self.runtime.main, loop.stepper.layout
        path = export(self.runtime.folder, self.plan, self.base, layout, self.tokenizer, main=main)
        if main:
            record.update(self.runtime.folder, model_files=digests(path))
        self.say(f"the model is in {path}")
        self.runtime.barrier()
        if self.refusal:
            raise JobFailed(self.refusal)
        return True

    def prepared(self) -> Prepared:
        score = self.config.objective.name == "reward"
        prepared = prepare(
            self.base,
            self.config.model,
            self.config.strategy,
            self.chosen,
            self.runtime.device,
            self.config.optimization.seed,
            score=score,
        )
        if score and prepared.model.config.pad_token_id is None:  # a score model is asked with several rows at once
            prepared.model.config.pad_token_id = self.pad_id
        return prepared

    def loop(self, prepared: Prepared) -> Loop:
        config, chosen, optimization = self.config, self.chosen, self.config.optimization
        rows = self.data.train_rows
        order = Order(
            n_rows=len(rows),
            global_batch=optimization.global_batch_size,
            seed=optimization.seed,
            epochs=optimization.epochs,
            max_steps=optimization.max_steps,
        )
        prepared.model.train()
        layout = place(prepared, chosen, self.runtime.device, self.make_optimizer)
        self.runtime.memory.enter(OTHER)
        dtype = compute_dtype(chosen.precision)
        stepper = Stepper(
            runtime=self.runtime,
            layout=layout,
            schedule=make_schedule(layout.optimizer, optimization, order.steps),
            objective=make_objective(config.objective),
            kernels=prepared.kernels is not None,
            autocast=None if dtype == torch.float32 else dtype,
            max_grad_norm=optimization.max_grad_norm,
            scaler=torch.amp.GradScaler(self.runtime.device.type) if dtype == torch.float16 else None,
        )
        train, held_out = self.with_reference(stepper)
        return Loop(
            runtime=self.runtime,
            stepper=stepper,
            units=train,
            rows=rows,
            packing=config.data.packing,
            order=order,
            held_out=held_out,
            judge=self.judge(held_out, stepper),
            micro_batch=chosen.micro_batch,
            pad_id=self.pad_id,
            evaluation=config.evaluation,
            checkpointing=config.checkpointing,
            identity={
                "base": load.fingerprint(self.base),
                "data": self.data.fingerprint,
                "rows": len(rows),
                "global_batch_size": optimization.global_batch_size,
                "seed": optimization.seed,
                "steps": order.steps,
            },
        )

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        chosen, decay = self.chosen, self.config.optimization.weight_decay
        return make_optimizer(model.named_parameters(), chosen.optimizer, chosen.learning_rate, decay)

    def with_reference(self, stepper: Stepper) -> tuple[Units, evaluate.HeldOut | None]:
        """Training units and held-out rows, and the objective's reference where it has one. Called before a checkpoint is
        loaded: the model is still the one that is compared with."""
        kind = self.config.objective.reference_for(self.chosen.method)
        train, held = self.data.train, self.data.eval
        if kind == "adapters_off":
            stepper.objective.reference = AdaptersOff()
        elif kind == "copy":
            stepper.objective.reference = Copy(
                prepare_frozen(self.base, self.config.model, self.config.strategy, self.chosen, self.runtime.device)
            )
        elif kind == "precomputed":
            stepper.objective.reference = Precomputed()
            train, held = precompute(self, stepper)
        return train, self.held_out(held)

    def held_out(self, units: Units | None) -> evaluate.HeldOut | None:
        if units is None or len(units) == 0:
            return None
        data = self.config.data
        return evaluate.HeldOut(
            units,
            room=row_tokens(data, self.config.objective),
            packing=data.packing,
            micro_batch=self.chosen.micro_batch,
            max_rows=self.config.evaluation.max_rows,
        )

    def judge(self, held_out: evaluate.HeldOut | None, stepper: Stepper) -> Judge | None:
        if held_out is None:
            return None
        return Judge(
            tokenizer=self.tokenizer,
            pad_id=self.pad_id,
            settings=self.config.evaluation,
            objective=self.config.objective.name,
            rule=stepper.objective,
            held_out=held_out,
        )

    @property
    def generations(self) -> int:
        """A score model writes nothing."""
        return 0 if self.config.objective.name == "reward" else self.config.evaluation.generations

    @property
    def pad_id(self) -> int:
        """Padding carries no loss and no attention reaches it, so which id it is does not matter; it must exist."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)

    def report(self, prepared: Prepared) -> None:
        """Which modules run on which kernels, into the record and onto the screen; on a GPU none is a failure."""
        found = prepared.kernels
        applied = found is not None and found.applied
        if self.runtime.device.type == "cuda" and not applied and self.config.strategy.kernels != "off":
            raise JobFailed(
                "the kernel layer was not applied to this model: "
                + (found.text() if found else "it is off")
                + " Train without it by --set strategy.kernels=off."
            )
        if found is not None:
            tables = self.runtime.gathered(found.launch_table_hash)
            if other := next((rank for rank, table in enumerate(tables) if table != tables[0]), 0):
                raise JobFailed(
                    f"the kernels' launch settings differ: table {tables[0]} on rank 0, {tables[other]} on rank {other}. They decide "
                    "the order of sums, so all ranks need the same; install the same Trebuchet on every node."
                )
        if not self.runtime.main:
            return
        record.update(
            self.runtime.folder,
            kernels=found.to_json() if found else {"applied": False, "reason": "strategy.kernels is off"},
            data=self.data.report.to_dict(),
            parameters={"trainable": prepared.trainable, "total": prepared.total},
        )
        for line in self.data.report.lines():
            self.say(line)
        self.say(found.summary() if found else "kernel layer: off")
        share = prepared.trainable / prepared.total
        self.say(
            f"training {prepared.trainable / 1e6:,.1f} M of {prepared.total / 1e6:,.1f} M parameters ({share:.1%})"
        )

    def before(self, loop: Loop, done: int) -> dict[str, Any] | None:
        """The base model's figures: measured once, at step 0, and read back by a resumed attempt."""
        path = self.runtime.folder.evaluation
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["before"]
        if loop.held_out is None or done > 0:
            return None
        found = self.measure(loop)
        if self.runtime.main and found:
            record.write_atomically(path, json.dumps({"before": found}, ensure_ascii=False, indent=1))
            self.say(f"before training: held-out {evaluate.in_words(found)}")
        self.runtime.barrier()
        return found

    def measure(self, loop: Loop, before: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Held-out figures on all ranks; answers on rank 0, or on all where a forward takes all of them."""
        if loop.held_out is None or loop.judge is None:
            return None
        found = loop.judge.measure(of_stepper(loop.stepper), before)
        if self.runtime.main or loop.stepper.layout.together:
            prompts = loop.held_out.prompts(self.generations)
            found["answers"] = evaluate.answers(
                of_stepper(loop.stepper), self.tokenizer, prompts, self.config.evaluation.max_new_tokens
            )
        self.runtime.barrier()
        return found

    def finish(self, loop: Loop, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        """Evaluation into the record and onto the screen."""
        if after is not None and loop.held_out is not None:
            prompts = loop.held_out.prompts(self.generations)
            decode = lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()  # noqa: E731
            samples = [{"prompt": decode(p), "reference": decode(r)} for p, r in prompts]
            for i, sample in enumerate(samples):
                sample["base"] = before["answers"][i] if before else ""
                sample["tuned"] = after["answers"][i]
            assert loop.judge is not None
            concluded = loop.judge.conclude(before, after, samples)
            figures = {"before": before, "after": after, "samples": samples, **concluded_parts(concluded)}
            record.write_atomically(self.runtime.folder.evaluation, json.dumps(figures, ensure_ascii=False, indent=1))
            record.update(self.runtime.folder, evaluation=concluded)
            self.refusal = loop.judge.refusal(concluded)

    def say(self, text: str) -> None:
        if self.runtime.main:
            print(text, file=sys.stderr, flush=True)


def concluded_parts(concluded: dict[str, Any]) -> dict[str, Any]:
    """Beside the full figures of before and after: what came of comparing them."""
    return {key: value for key, value in concluded.items() if key not in ("before", "after")}
