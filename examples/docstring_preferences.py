"""Preferences from the Python standard library of this machine: a docstring over the same words in another order.

    python examples/docstring_preferences.py FOLDER    writes FOLDER/pairs-{train,heldout}.jsonl for dpo, orpo, simpo, cpo and
                                                       reward, and FOLDER/judged-{train,heldout}.jsonl for kto

A pair asks for the docstring of a function; chosen is the one its author wrote, rejected has its words shuffled. A judged row
is one of both, by turns, with its label. The held-out rows come from modules that training never sees, as in
`stdlib_docstrings.py`.
"""

from __future__ import annotations

import json
import random
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

SOURCE = runpy.run_path(str(Path(__file__).with_name("stdlib_docstrings.py")))
MAX_SOURCE_CHARS, MAX_DOCSTRING_CHARS, MIN_WORDS = 360, 160, 5


def rows(library: Path) -> dict[bool, list[dict[str, Any]]]:
    """Held out or not -> pairs, each function once and no source on both sides."""
    sides: dict[bool, dict[str, dict[str, Any]]] = {False: {}, True: {}}
    for module, source, docstring in SOURCE["pairs"](library):
        words = docstring.split()
        if len(source) > MAX_SOURCE_CHARS or len(docstring) > MAX_DOCSTRING_CHARS or len(set(words)) < MIN_WORDS:
            continue
        shuffled = list(words)
        random.Random(source).shuffle(shuffled)  # the same order in every run
        if shuffled == words:
            continue
        question = [{"role": "user", "content": SOURCE["QUESTION"].format(source=source)}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (" ".join(words), " ".join(shuffled)))
        sides[SOURCE["held_out"](module)].setdefault(
            source, {"prompt": question, "chosen": chosen, "rejected": rejected}
        )
    for source in sides[False].keys() & sides[True].keys():
        del sides[True][source]
    return {held: list(found.values()) for held, found in sides.items()}


def judged(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One answer of each pair: every second one is the good one."""
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, pair in enumerate(pairs)
    ]


def main(folder: Path) -> None:
    found = rows(Path(sysconfig.get_paths()["stdlib"]))
    folder.mkdir(parents=True, exist_ok=True)
    for held, side in ((False, "train"), (True, "heldout")):
        for kind, lines in (("pairs", found[held]), ("judged", judged(found[held]))):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
            (folder / f"{kind}-{side}.jsonl").write_text(text, encoding="utf-8")
            print(f"{folder / f'{kind}-{side}.jsonl'}: {len(lines)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/docstring_preferences.py FOLDER")
    main(Path(sys.argv[1]))
