"""`trebuchet convert FILE`: an axolotl, LlamaFactory or TRL YAML into ours, and a line for every key that could not be carried.

Most keys are rows of `convert_keys.json`; those that are read together are in `convert_axolotl.py` and `convert_hf.py`. What comes out
is a valid configuration: a carried value that our schema refuses is taken back and listed too. Left out: reading the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .config import build_config
from .errors import ConfigError, UserError, did_you_mean
from .schema import Objective, TrainConfig

Tree = dict[str, Any]
FORMATS = ("axolotl", "llamafactory", "trl")
_SIGNS = {
    "axolotl": (
        "base_model",
        "sequence_len",
        "micro_batch_size",
        "adapter",
        "num_epochs",
        "datasets",
        "lora_target_linear",
    ),
    "llamafactory": ("stage", "finetuning_type", "cutoff_len", "template", "dataset", "lora_target", "dataset_dir"),
    "trl": (
        "dataset_name",
        "use_peft",
        "max_length",
        "assistant_only_loss",
        "loss_type",
        "lora_target_modules",
        "beta",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """`tree` is a valid configuration as few keys as it takes; `carried` maps their keys to ours; `lines` are those that were not
    carried, or not just so, each `key: value: what there is instead`; `empty` had no value."""

    format: str
    tree: Tree
    carried: Mapping[str, str]
    lines: tuple[str, ...]
    empty: tuple[str, ...]

    def text(self) -> str:
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)


@dataclass
class Keys:
    """Their keys while they are read: each ends as carried, as a line, or as empty."""

    tree: Tree
    out: Tree = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """A value without deciding about it."""
        return number(self.tree.get(key))

    def take(self, key: str, to: str, value: Any = None) -> None:
        """Carries `key` to our dotted path, with another value where one is given."""
        self.set(to, self.get(key) if value is None else value)
        self.carried[key] = to

    def note(self, key: str, text: str) -> None:
        """A line about a key, whether it was carried or not."""
        if key in self.tree:
            self.lines[key] = f"{key}: {shown(self.tree[key])}: {text}"

    def set(self, to: str, value: Any) -> None:
        *sections, leaf = to.split(".")
        here = self.out
        for section in sections:
            here = here.setdefault(section, {})
        here[leaf] = value

    def table(self, *names: str) -> None:
        """Everything that is left, by the tables of these names."""
        known: dict[str, Any] = {}
        for name in reversed(names):
            known |= tables()[name]
        for key, value in self.tree.items():
            if key in self.carried or key in self.lines or value is None:
                continue
            entry = known.get(key)
            if isinstance(entry, dict):
                word = str(value).lower() if isinstance(value, bool) else str(value)
                if word in entry["values"]:
                    self.take(key, entry["to"], entry["values"][word])
                else:
                    options = ", ".join(dict.fromkeys(entry["values"].values()))
                    self.note(key, f"{entry['to']} has {options}")
            elif isinstance(entry, str) and entry.startswith("="):
                self.take(key, entry[1:])
            elif isinstance(entry, str):
                self.note(key, entry)
            else:
                self.note(key, f"not known here{did_you_mean(key, our_keys())}")


def convert(path: str | Path, *, format: str | None = None, objective: str | None = None, gpus: int = 1) -> Converted:
    """Raises UserError when the file is none of the three, or lacks what every configuration needs.

    `format` and `objective` where the file does not say them; `gpus` is how many devices it was written for, by which the global
    batch is reckoned.
    """
    tree = _read(Path(path))
    format = format or _recognise(tree, str(path))
    keys = Keys({str(key): value for key, value in tree.items()})
    if format == "axolotl":
        from . import convert_axolotl

        convert_axolotl.read(keys, gpus)
        keys.table("axolotl", "hf")
    else:
        from . import convert_hf

        convert_hf.read(keys, format, gpus, Path(path).parent)
        keys.table(format, "hf")
    if objective:
        keys.out["objective"] = {"name": objective}
    for section in ("model", "data"):
        leaf = {"model": "name", "data": "train"}[section]
        if not keys.out.get(section, {}).get(leaf):
            raise UserError(f"{path}: no {section} is named in it, which every run needs ({_NEEDED[format][section]}).")
    _take_back(keys)
    empty = [key for key, value in tree.items() if value is None and key not in keys.carried and key not in keys.lines]
    return Converted(
        format=format,
        tree=keys.out,
        carried=keys.carried,
        lines=tuple(keys.lines.values()),
        empty=tuple(map(str, empty)),
    )


_NEEDED = {
    "axolotl": {"model": "base_model", "data": "datasets"},
    "llamafactory": {"model": "model_name_or_path", "data": "dataset"},
    "trl": {"model": "model_name_or_path", "data": "dataset_name"},
}


def _read(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: must hold keys and values, as axolotl, LlamaFactory and TRL have them.")
    return tree


def _recognise(tree: Tree, path: str) -> str:
    hits = {name: sum(sign in tree for sign in signs) for name, signs in _SIGNS.items()}
    best = max(hits, key=lambda name: hits[name])
    if "model" in tree and "data" in tree and "model_name_or_path" not in tree and "base_model" not in tree:
        raise UserError(f"{path} is ours already; `trebuchet plan {path}` reads it.")
    if not hits[best] or sorted(hits.values())[-2] == hits[best]:
        raise UserError(f"{path}: cannot tell whose YAML this is; say it with --from: {', '.join(FORMATS)}.")
    return best


def _take_back(keys: Keys) -> None:
    """Values that our schema refuses become lines."""
    while True:
        try:
            build_config(keys.out)
            return
        except ConfigError as error:
            wrong = {problem.split(": ")[0]: problem.partition(": ")[2] for problem in error.problems}
            back = [
                (key, to) for key, to in keys.carried.items() if any(p == to or p.startswith(to + ".") for p in wrong)
            ]
            for section in (
                p for p in wrong if p and p in keys.out
            ):  # of a section as a whole; mostly it begins with the key
                held = [
                    (key, to) for key, to in keys.carried.items() if to.split(".")[0] == section and to != "model.name"
                ]
                named = [(key, to) for key, to in held if to == f"{section}.{wrong[section].split()[0]}"]
                back += named or held
            if not back:
                raise UserError(f"what was converted is not valid: {error}") from None
            for key, to in dict(back).items():
                why = next(text for p, text in wrong.items() if p == to or p.startswith(to + ".") or to.startswith(p))
                _remove(keys.out, to)
                del keys.carried[key]
                keys.note(key, f"{to} {why}")


def _remove(tree: Tree, to: str) -> None:
    section, _, rest = to.partition(".")
    if rest:
        _remove(tree.get(section, {}), rest)
        if not tree.get(section, True):
            del tree[section]
    else:
        tree.pop(section, None)


def number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text, for want of a dot."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.strip()[:1] in "0123456789+-." else value
        except ValueError:
            return value
    return value


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


@lru_cache(maxsize=1)
def tables() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath("convert_keys.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, Any]] = json.loads(text)
    return loaded


def our_keys() -> Sequence[str]:
    """Dotted names, for the nearest one."""
    return [
        f"{section}.{name}"
        for section, held in TrainConfig.model_fields.items()
        for name in getattr(held.annotation, "model_fields", {})
    ]


OBJECTIVES = tuple(Objective.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
