"""From a YAML file and `--set a.b=c` to a checked `TrainConfig`; errors all at once, with line, dotted path and nearest key.

The fields themselves are in `schema.py`. Left out: anything that needs the model, the data or the cluster; those are checked
where they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ConfigError, did_you_mean
from .schema import SHORTHAND, Source, TrainConfig, expand_sources
from .schema_base import section_of

Tree = dict[str, Any]
# libyaml's where PyYAML has it: a sweep writes one file for each trial, and in Python each takes 25 ms (measured, two cores, loaded).
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads one YAML file.

    `overrides` are `dotted.path=value` strings, the value read as YAML; they win over the file. Raises ConfigError with every
    problem at once. Relative paths in the file stay as written: they are relative to where the command runs.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"cannot read the configuration: {reason}"], str(path)) from None
    tree, lines = _parse(text, str(path))
    return build_config(tree, overrides, source=str(path), lines=lines, default_output=f"runs/{path.stem}")


def build_config(
    tree: Tree,
    overrides: Sequence[str] = (),
    *,
    source: str | None = None,
    lines: dict[tuple[str, ...], int] | None = None,
    default_output: str = "runs/run",
) -> TrainConfig:
    """The same from a mapping, as notebooks write it; `tree` is not changed."""
    tree = _expand(tree)
    for override in overrides:
        tree = _expand(_apply(tree, override))
    tree.setdefault("output", default_output)
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(list(_problems(error, lines or {})), source) from None


def with_values(config: TrainConfig, values: Mapping[str, Any], *, source: str) -> TrainConfig:
    """The configuration with values at dotted paths, checked like a file. Raises ConfigError that names `source`."""
    tree = config.model_dump(mode="json")
    for path, value in values.items():
        tree = _put(tree, path, value, f"{source}: {path}")
    return build_config(tree, source=source)


def dump_config(config: TrainConfig) -> str:
    """The resolved configuration as YAML, every default written out; `load_config` reads it back equal."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)


def json_schema() -> Tree:
    """JSON schema for editors, with the shorthands of DESIGN (`model: NAME`, `data: PATH`, …) allowed."""
    schema = TrainConfig.model_json_schema()
    for section in SHORTHAND:
        schema["properties"][section] = {"anyOf": [schema["properties"][section], {"type": "string"}]}
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    rows = [*source["anyOf"], {"type": "array", "items": source, "minItems": 1}]
    data = schema["$defs"]["Data"]["properties"]
    data["train"] = {"anyOf": rows, "description": data["train"]["description"]}
    share = {"type": "number", "minimum": 0, "exclusiveMaximum": 1, "default": data["eval"]["default"]}
    data["eval"] = {"anyOf": [share, *rows], "description": data["eval"]["description"]}
    data["curate"]["anyOf"].append({"type": "boolean"})
    path = schema["$defs"]["General"]["properties"]["path"]
    schema["$defs"]["General"]["properties"]["path"] = {"anyOf": rows, "description": path["description"]}
    schema["properties"]["data"]["anyOf"].append(rows[-1])
    schema["properties"]["output"]["default"] = "runs/NAME"
    schema["required"] = ["model", "data"]
    schema["title"] = "Trebuchet training configuration"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _parse(text: str, source: str) -> tuple[Tree, dict[tuple[str, ...], int]]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError([f"{where}not valid YAML: {getattr(error, 'problem', None) or error}"], source) from None
    if node is None or not isinstance(tree, dict):
        raise ConfigError(["the file must hold keys and values; two are enough, `model:` and `data:`"], source)
    lines: dict[tuple[str, ...], int] = {}
    twice = [f"line {line}: {'.'.join(path)}: written twice" for path, line in _walk(node, (), lines)]
    if twice:  # PyYAML keeps the last one without a word
        raise ConfigError(twice, source)
    return tree, lines


def _walk(
    node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int]
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Fills `lines` with the line of every key; yields the keys that stand twice in one mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, line = (*path, str(key.value)), key.start_mark.line + 1
            if here in lines:
                yield here, line
            lines[here] = line
            yield from _walk(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, str(i))] = value.start_mark.line + 1
            yield from _walk(value, (*path, str(i)), lines)


def _expand(tree: Tree) -> Tree:
    """A deep copy with shorthands written out, so that `--set model.dtype=bf16` works on `model: NAME`. A section without a
    value is a heading whose keys are commented out: its defaults."""
    out: Tree = {}
    for key, value in tree.items():
        if value is None and key in TrainConfig.model_fields:
            continue
        if key in SHORTHAND and value is not None and not isinstance(value, dict):
            value = {SHORTHAND[key]: value}
        out[str(key)] = _copy(value)
    data = out.get("data")
    if isinstance(data, dict):
        for key in ("train", "eval"):
            if isinstance(data.get(key), (str, dict, list)):
                data[key] = expand_sources(data[key])
        general = data.get("general")
        if isinstance(general, dict) and isinstance(general.get("path"), (str, dict, list)):
            general["path"] = expand_sources(general["path"])
    return out


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value


def _apply(tree: Tree, override: str) -> Tree:
    path, equals, raw = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", path.strip()):
        raise ConfigError([f"--set {override!r}: write it as section.key=value"])
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        value = raw
    return _put(tree, path.strip(), value, f"--set {path}")


def _put(tree: Tree, path: str, value: Any, said: str) -> Tree:
    """Changes `tree`; `said` is how the user named the key."""
    *parents, leaf = path.split(".")
    here: Any = tree
    for name in parents:
        here = here.setdefault(name, {}) if isinstance(here, dict) else here[int(name)] if _index(here, name) else None
        if not isinstance(here, (dict, list)):
            raise ConfigError([f"{said}: '{name}' is a value, not a section"])
    if isinstance(here, list):
        if not _index(here, leaf):
            raise ConfigError([f"{said}: the list has {len(here)} entries, counted from 0"])
        here[int(leaf)] = value
    else:
        here[leaf] = value
    return tree


def _index(items: Any, name: str) -> bool:
    return isinstance(items, list) and name.isdigit() and int(name) < len(items)


def _problems(error: ValidationError, lines: dict[tuple[str, ...], int]) -> Iterator[str]:
    """One sentence per wrong key: several complaints about one key (the arms of a union) are joined by 'or'."""
    grouped: dict[tuple[str, ...], list[Any]] = {}
    for item in error.errors():
        path = _real_path(item["loc"], key_last=item["type"] in ("extra_forbidden", "missing"))
        grouped.setdefault(path, []).append(item)
    for path, items in grouped.items():
        if items[0]["type"] == "too_short" and any(p[: len(path)] == path for p in grouped if p != path):
            continue  # pydantic counts the entries that were right
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        where = f"line {line}: " if line else ""
        yield f"{where}{'.'.join(path)}: {_sentence(path, items)}"


def _sentence(path: tuple[str, ...], items: list[Any]) -> str:
    first = items[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key{_suggest(path)}"
    if first["type"] == "missing":
        return "missing"
    if first["type"] in ("too_short", "string_too_short"):
        return "must not be empty"
    wants = []
    for item in items:
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").split(", unable to parse")[0]
        text = re.sub(r"a valid dictionary or instance of \w+", "keys and values", text)
        for theirs, ours in (("a valid tuple", "a list"), ("a valid integer", "a whole number"), ("a valid ", "a ")):
            text = text.replace(theirs, ours)
        if text not in wants:
            wants.append(text)
    if first["type"] == "value_error":
        return wants[0]
    return f"must be {' or '.join(wants)}, not {first['input']!r}"


def _suggest(path: tuple[str, ...]) -> str:
    """The nearest key of the same section, else the same key in another section, else the section's keys."""
    *parents, leaf = path
    section = _section(parents)
    siblings = list(section.model_fields) if section else []
    hint = did_you_mean(leaf, siblings)
    if not hint.startswith("; did"):
        for name, field in TrainConfig.model_fields.items():
            inner = section_of(field.annotation)
            if inner and leaf in inner.model_fields:
                return f"; did you mean '{name}.{leaf}'?"
    return hint


def _section(path: Sequence[str]) -> type[BaseModel] | None:
    """The model that holds the keys under `path`, or None for a free mapping."""
    section: type[BaseModel] | None = TrainConfig
    for name in path:
        if name.isdigit():
            section = Source
            continue
        field = section.model_fields.get(name) if section else None
        section = section_of(field.annotation) if field else None
    return section


def _real_path(loc: tuple[int | str, ...], *, key_last: bool) -> tuple[str, ...]:
    """Pydantic's location without the names of union arms, which are not keys of the file. `key_last`: its end surely is one."""
    out: list[str] = []
    for part in loc[: len(loc) - key_last]:
        section = _section(out)
        last_is_field = bool(out) and section is None and not out[-1].isdigit()
        if (
            isinstance(part, int)
            or (section is not None and (part in section.model_fields or part.isidentifier()))
            or (last_is_field and out[-1] == "columns")
        ):
            out.append(str(part))
    return (*out, *(str(part) for part in loc[len(loc) - key_last :]))
