"""Rules of the user's own: a YAML file of conditions on fields, and a Python function by path.

    - {name: no links, field: $answer, drop_if_matches: 'https?://'}
    - {name: scored, field: meta.score, keep_if_at_least: 0.7}
    - {name: tasks, field: task, keep_if_in: [qa, code]}

A field is a column, a.b inside one, or $prompt, $answer, $text of the sample whatever its layout. A row without the field is kept by
drop rules and dropped by keep rules. Regular expressions are Python's, found anywhere. Left out: rewriting rows.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ....launcher.errors import ConfigError, DataError, did_you_mean

_MISSING = object()
Verdict = Callable[[Mapping[str, Any], Mapping[str, str]], str | None]  # (row, $fields) -> reason or None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")  # compares false with everything


# condition -> (the kinds of argument, does the value meet it)
_TESTS: dict[str, tuple[type | tuple[type, ...], Callable[[Any, Any], bool]]] = {
    "matches": (str, lambda value, pattern: bool(pattern.search(value if isinstance(value, str) else str(value)))),
    "in": (list, lambda value, allowed: value in allowed),
    "at_least": ((int, float), lambda value, limit: _number(value) >= limit),
    "at_most": ((int, float), lambda value, limit: _number(value) <= limit),
    "longer_than": (int, lambda value, limit: len(value if isinstance(value, (str, list)) else str(value)) > limit),
}
CONDITIONS = {f"{action}_if_{test}": (action, test) for action in ("drop", "keep") for test in _TESTS}


def load_rules(path: str) -> list[Verdict]:
    """Raises ConfigError with every problem of the file at once."""
    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"rules cannot be read: {' '.join(str(error).split())}"], path) from None
    rules = tree.get("rules") if isinstance(tree, dict) else tree
    if not isinstance(rules, list) or not rules:
        raise ConfigError(["must be a list of rules, each with a name, a field and one condition"], path)
    problems: list[str] = []
    made = [_rule(number, rule, problems) for number, rule in enumerate(rules, start=1)]
    if problems:
        raise ConfigError(problems, path)
    return [verdict for verdict in made if verdict]


def _rule(number: int, rule: Any, problems: list[str]) -> Verdict | None:
    if not isinstance(rule, dict):
        problems.append(f"rule {number}: must be keys and values")
        return None
    name, where = rule.get("name"), f"rule {number}"
    keys = [key for key in rule if key not in ("name", "field")]
    if not isinstance(name, str) or not isinstance(rule.get("field"), str):
        problems.append(f"{where}: needs a name and a field")
    elif len(keys) != 1 or keys[0] not in CONDITIONS:
        unknown = next((key for key in keys if key not in CONDITIONS), None)
        hint = did_you_mean(str(unknown), CONDITIONS) if unknown else "; one condition a rule"
        problems.append(f"{where} ({name}): {f'unknown condition {unknown}' if unknown else 'conditions'}{hint}")
    else:
        action, test = CONDITIONS[keys[0]]
        kind, meets = _TESTS[test]
        argument = rule[keys[0]]
        try:
            if not isinstance(argument, kind) or isinstance(argument, bool):
                raise TypeError(f"{keys[0]} cannot be {argument!r}")
            argument = re.compile(argument) if test == "matches" else argument
        except (TypeError, re.error) as error:
            problems.append(f"{where} ({name}): {error}")
            return None
        return _verdict(name, rule["field"], action == "drop", meets, argument)
    return None


def _verdict(name: str, field: str, drop: bool, meets: Callable[[Any, Any], bool], argument: Any) -> Verdict:
    def verdict(row: Mapping[str, Any], own: Mapping[str, str]) -> str | None:
        value = own[field] if field in own else look_up(row, field, _MISSING)
        met = value is not _MISSING and value is not None and meets(value, argument)
        return f"rule {name}" if met == drop else None

    return verdict


def look_up(row: Mapping[str, Any], field: str, default: Any = None) -> Any:
    """A column of that name, else a.b as a key inside a column."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def load_function(where: str) -> Verdict:
    """`FILE.py:NAME` or `module:NAME`: a function of the row (a dict) that returns True or None to keep it, False or a reason to
    drop it. Raises ConfigError when it cannot be imported; what it raises on a row is a DataError."""
    source, _, name = where.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location("trebuchet_rules", Path(source).expanduser())
            if spec is None or spec.loader is None:
                raise ImportError(f"{source} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # a user's module can raise anything
        raise ConfigError([f"data.curate.function: {where}: {type(error).__name__}: {error}"]) from None

    def verdict(row: Mapping[str, Any], own: Mapping[str, str]) -> str | None:
        try:
            answer = function(dict(row))
        except Exception as error:
            raise DataError(f"{where} failed on a row: {type(error).__name__}: {error}.") from error
        if answer is None or answer is True:
            return None
        return f"{name}: {answer}" if isinstance(answer, str) and answer else f"function {name}"

    return verdict


def content(rules: Sequence[str], function: str | None) -> str:
    """Identity of the rule files and of the function's own file; what that file imports is not in it."""
    digest = hashlib.blake2b(digest_size=16)
    source = (function or "").rpartition(":")[0]
    if function and not source.endswith(".py"):
        spec = importlib.util.find_spec(source)
        source = spec.origin if spec and spec.origin else ""
    for path in [*rules, *([source] if source else [])]:
        try:
            digest.update(Path(path).expanduser().read_bytes())
        except OSError as error:
            raise ConfigError([f"data.curate: {path} cannot be read: {error.strerror}"]) from None
    return digest.hexdigest() + (function or "")
