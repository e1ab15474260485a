"""(function, docstring) pairs from the Python standard library of this machine, as chat rows.

    python examples/stdlib_docstrings.py FOLDER        writes FOLDER/train.jsonl and FOLDER/heldout.jsonl

A row asks for the docstring of a function and answers with the one its author wrote. The held-out rows come from modules that
training never sees: a module, with everything below it, is on one side by a hash of its name. A function whose body stands in
both is dropped from the held-out side.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

QUESTION = "Write the docstring of this Python function.\n\n```python\n{source}\n```"
HELD_OUT_SHARE = 0.12
MAX_SOURCE_CHARS, MAX_DOCSTRING_CHARS, MIN_DOCSTRING_CHARS = 900, 400, 20


def pairs(library: Path) -> Iterator[tuple[str, str, str]]:
    """(module, source without its docstring, docstring) of every function that is short enough, in sorted order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (docstring := ast.get_docstring(node)):
                node.body = node.body[1:]
                if node.body:
                    yield ".".join(parts), ast.unparse(node), inspect.cleandoc(docstring)


def held_out(module: str) -> bool:
    """By the top-level module, so that `email.message` and `email.parser` are never on different sides."""
    top = module.split(".")[0].lstrip("_")
    return int.from_bytes(hashlib.sha256(top.encode()).digest()[:4], "big") / 2**32 < HELD_OUT_SHARE


def main(folder: Path) -> None:
    rows: dict[bool, dict[str, dict[str, object]]] = {False: {}, True: {}}
    for module, source, docstring in pairs(Path(sysconfig.get_paths()["stdlib"])):
        if len(source) <= MAX_SOURCE_CHARS and MIN_DOCSTRING_CHARS <= len(docstring) <= MAX_DOCSTRING_CHARS:
            messages = [
                {"role": "user", "content": QUESTION.format(source=source)},
                {"role": "assistant", "content": docstring},
            ]
            rows[held_out(module)].setdefault(source, {"messages": messages, "module": module})
    for source in rows[False].keys() & rows[True].keys():
        del rows[True][source]
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in (("train", rows[False]), ("heldout", rows[True])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side.values())
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        modules = {str(row["module"]).split(".")[0] for row in side.values()}
        print(f"{folder / name}.jsonl: {len(side)} functions of {len(modules)} modules")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/stdlib_docstrings.py FOLDER")
    main(Path(sys.argv[1]))
