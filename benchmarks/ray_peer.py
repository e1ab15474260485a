"""Sixteen trials by plain ray.tune, as its documentation shows: the function tokenizes, trains with transformers.Trainer, evaluates.

python -P benchmarks/ray_peer.py SETTINGS.json     benchmarks/ray.py writes it; prints seconds as JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def trial(config: dict[str, Any]) -> None:
    import torch
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(config["model"])

    def encoded(path: str) -> list[dict[str, list[int]]]:
        out = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            turns = json.loads(line)["messages"]
            whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=True, return_dict=False)
            ids = whole[: config["max_length"]]
            out.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
        return out

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        pad = lambda values, by: torch.tensor([v + [by] * (longest - len(v)) for v in values])  # noqa: E731
        ids = [row["input_ids"] for row in rows]
        mask = pad([[1] * len(v) for v in ids], 0)
        return {"input_ids": pad(ids, 0), "labels": pad([r["labels"] for r in rows], -100), "attention_mask": mask}

    output = tune.get_context().get_trial_dir()
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=config["steps"],
        per_device_train_batch_size=config["batch"],
        learning_rate=config["rate"],
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(config["model"]), arguments, data_collator=collate,
        train_dataset=encoded(config["train"]), eval_dataset=encoded(config["eval"]),
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    trainer.save_model(f"{output}/model")
    tune.report({"eval_loss": trainer.evaluate()["eval_loss"]})


def main(file: str) -> None:
    began = time.time()
    settings = json.loads(Path(file).read_text())
    import ray
    from ray import tune

    ray.init(address=settings["address"], log_to_driver=False, runtime_env={"env_vars": settings["environment"]})
    space = {key: settings[key] for key in ("model", "train", "eval", "max_length", "steps", "batch")}
    results = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={**space, "rate": tune.grid_search(settings["rates"])},
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min", max_concurrent_trials=settings["parallel"]),
        run_config=tune.RunConfig(name="peer", storage_path=settings["output"], verbose=0),
    ).fit()
    losses = [result.metrics["eval_loss"] for result in results if not result.error]
    print(
        json.dumps(
            {"seconds": time.time() - began, "finished": len(losses), "errors": len(results.errors), "losses": losses}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
