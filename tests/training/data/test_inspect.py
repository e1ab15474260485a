"""`trebuchet data inspect`: what is shown is what is trained, and nothing of the data gets out of its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.launcher import cli
from trebuchet.training.data import inspect

Config = Callable[..., dict[str, Any]]
HOSTILE = "</pre><script>alert('x')</script><img src=http://a.b/c onerror=x> \x1b[31mred\x1b[2J &amp; \u202e"


@pytest.fixture
def shown(tmp_path: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints for rows under an objective."""

    def run(rows: list[dict[str, Any]], *arguments: str, **changes: Any) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = tmp_path / "inspect.yaml"
        config.write_text(yaml.safe_dump(tiny_config({"data.train": str(file), "data.eval": 0, **changes})))
        assert cli.main(["data", "inspect", str(config), *arguments]) == 0
        return capsys.readouterr().out

    return run


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_trained_tokens_stand_between_marks(shown: Callable[..., str]) -> None:
    out = shown([talk(f"question {i}", f"answer {i}") for i in range(9)], "--samples", "3")
    found = re.findall(r"⟦(.*?)⟧", out, re.DOTALL)
    assert found == ["answer 1<|im_end|>", "answer 4<|im_end|>", "answer 7<|im_end|>"]
    assert "user\nquestion 4<|im_end|>" in out  # the prompt is there, and not marked
    assert "masks: 9 by incremental" in out and "samples            9" in out and "packing" in out


def test_the_counts_are_those_of_the_tokens_in_the_terminal_and_on_the_page(
    shown: Callable[..., str], tmp_path: Path, by_template: Callable[[Path], Any]
) -> None:
    out = shown([talk(f"{i} " * (1 + 3 * i), f"answer {i}") for i in range(9)])
    page = tmp_path / "page.html"
    assert cli.main(["data", "inspect", str(tmp_path / "inspect.yaml"), "--html", str(page)]) == 0
    samples = by_template(tmp_path / "rows.jsonl")
    lengths = [ids.shape[1] for ids, _, _ in samples]
    tokens, trained = sum(lengths), sum(end - first for _, first, end in samples)
    wanted = {
        "tokens": f"{tokens:,}",
        "trained": f"{trained:,} ({trained / tokens:.1%})",
        "cut at max_length": "0",
        "dropped": "0",
    }
    rows = re.search(r"packing +(\d+) rows, ([\d.]+)% full", out)
    assert rows and tokens / (96 * int(rows[1])) == pytest.approx(float(rows[2]) / 100, abs=0.0006)  # max_length is 96
    found = [(int(limit), int(n)) for limit, n in re.findall(r"up to (\d+) tokens +#* +(\d+)$", out, re.MULTILINE)]
    text = page.read_text(encoding="utf-8")
    for name, value in wanted.items():
        assert (
            re.search(rf"^  {name} +{re.escape(value)}$", out, re.MULTILINE)
            and f"<td>{name}</td><td>{value}</td>" in text
        )
    below = 0
    for limit, count in found:
        assert count == sum(below < length <= limit for length in lengths)
        assert re.search(rf"up to {limit} tokens</td>.*?</span> {count}</td>", text)
        below = limit
    assert sum(count for _, count in found) == 9 and len(found) > 1


def test_a_terminal_gets_colour_and_no_escapes_of_the_data(shown: Callable[..., str]) -> None:
    from trebuchet.training.data.inspect import GREEN, Look, Piece, Shown

    look = Look(
        units=((0, (Shown(title="sample", tokens=3, trained=1, pieces=(Piece(text=HOSTILE, trained=True),)),)),),
        report=None,  # type: ignore[arg-type]
    )
    out = inspect._marked(look.units[0][1][0], True)
    assert out.startswith(GREEN) and out.count("\x1b") == 2  # ours: on and off
    assert "␛[31mred" in out and "\u202e" not in out and "⟨U+202E⟩" in out


def test_the_page_shows_pairs_side_by_side_and_is_inert(shown: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i} {HOSTILE}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(4)]
    page = tmp_path / "page.html"
    said = shown(rows, "--html", str(page), "--samples", "2", objective="dpo", **{"data.max_length": 256})
    assert str(page) in said
    text = page.read_text(encoding="utf-8")

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, list[Any]]] = []
            self.marks: list[str] = []
            self.inside = False

        def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
            self.seen.append((tag, attrs))
            self.inside = tag == "mark"

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.marks.append(data)

    parser = Tags()
    parser.feed(text)
    tags = [tag for tag, _ in parser.seen]
    assert not {"script", "img", "link", "iframe", "a"} & set(tags)
    assert not [a for _, attrs in parser.seen for a in attrs if a[0] in ("src", "href") or a[0].startswith("on")]
    assert parser.marks[1:] == [" good 1<|im_end|>", " bad 1<|im_end|>", " good 3<|im_end|>", " bad 3<|im_end|>"]
    assert tags.count("section") == 2 and text.count('class="side"') == 4
    assert "alert('x')" not in text and "alert(&#x27;x&#x27;)" in text  # the row's text, escaped
    assert "default-src 'none'" in text and "\x1b" not in text


def test_what_is_dropped_is_counted_with_its_reason(shown: Callable[..., str]) -> None:
    rows = [
        {"prompt": f"p{i}", "chosen": " yes", "rejected": " no " + "river stone " * (30 if i < 2 else 1)}
        for i in range(8)
    ]
    out = shown(rows, objective="reward", **{"data.max_length": 40, "data.max_truncated": 0.5})
    assert "2 as longer than max_length" in out and re.search(r"samples +6\n", out)
    out = shown(rows, objective="dpo", **{"data.max_length": 40, "data.max_truncated": 0.5})
    assert re.search(r"cut at max_length +2\n", out) and re.search(r"samples +8\n", out)
