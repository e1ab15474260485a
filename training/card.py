"""The README.md of a model folder: what it is, from which base and data, by which plan, how well, under which licence.

Everything in it comes from the run record; what the record does not hold is not claimed. Hub ids and revisions name the base;
paths of this machine stay out. User text stands in fenced blocks that it cannot close.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from .finished import Finished

TEMPLATE = Path(__file__).with_name("card.jinja")
SPDX = re.compile(r"^\s*license:\s*['\"]?([\w.+-]+)", re.MULTILINE)


def write_card(folder: Path, run: Finished, **more: Any) -> None:
    """`more`: merge or export facts, shown when given."""
    (folder / "README.md").write_text(card(run, **more), encoding="utf-8")


def card(run: Finished, **more: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"fenced": fenced, "inline": inline}
    evaluation = run.folder.evaluation
    samples = json.loads(evaluation.read_text(encoding="utf-8"))["samples"] if evaluation.exists() else []
    facts = {
        "metadata": metadata(run, merged=bool(more.get("merge"))),
        "record": run.record,
        "plan": run.plan,
        "chosen": run.chosen,
        "config": run.plan.config,
        "base": public_name(run.plan.config.model.name),
        "revision": run.plan.model.revision,
        "licence": licence_of(run.base),
        "licence_files": [file.name for file in sorted(run.base.glob("LICENSE*"))],
        "sources": [(public_name(s["path"]), s) for s in (run.record.get("data") or {}).get("sources", [])],
        "samples": samples,
        "opens_as": "AutoModelForSequenceClassification" if is_score(run) else "AutoModelForCausalLM",
        "merge": None,
        "export": None,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(facts | more)


def metadata(run: Finished, *, merged: bool) -> str:
    """The YAML that the Hub reads."""
    from huggingface_hub import ModelCardData

    name = run.plan.config.model.name
    adapter = run.chosen.method != "full" and not merged
    data = ModelCardData(
        base_model=None if Path(name).is_absolute() else name,
        license=licence_of(run.base),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if is_score(run) else "text-generation",
        tags=["trebuchet", run.plan.config.objective.name, run.chosen.method],
    )
    return str(data.to_yaml()).strip()


def is_score(run: Finished) -> bool:
    return run.plan.config.objective.name == "reward"


def licence_of(base: Path) -> str | None:
    """The SPDX name in the front matter of the base's README.md; None when it does not say."""
    readme = base / "README.md"
    if not readme.exists():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    head = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    found = SPDX.search(head)
    return found[1] if found else None


def public_name(name: str) -> str:
    """A Hub id as it is, of a path only its last part."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(("~", ".")) else name


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def inline(text: Any) -> str:
    """One line that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(str(text).split()))
