"""Writes docs/configuration.md from the schema, so that the page cannot say something else than the code.

python docs/generate.py            a test fails when the page was not written again after a change
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from trebuchet.launcher.config import json_schema
from trebuchet.launcher.schema import SHORTHAND, TrainConfig
from trebuchet.launcher.schema_base import section_of

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# The YAML of a run

Two keys are enough, `model` and `data`; everything else has a default, and `auto` is the planner's to fill. An unknown key is an
error that names the nearest valid one; all errors come at once. `--set a.b=c` changes a key from the command line. The configuration
with every default written out is saved with the run, in `RUN/train.yaml`.

For completion and checks in an editor: `trebuchet config-schema > trebuchet.schema.json`, and as first line of the YAML
`# yaml-language-server: $schema=trebuchet.schema.json`.

Written as one word: """


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    words = ", ".join(f"`{section}: X` is `{section}: {{{key}: X}}`" for section, key in SHORTHAND.items())
    return HEAD + words + ".\n" + "".join(sections())


def sections() -> list[str]:
    schema = json_schema()
    out = ["\n## Top level\n\n", table(TrainConfig, schema, "")]
    for name, field in TrainConfig.model_fields.items():
        if section := section_of(field.annotation):
            out += [f"\n## {name}\n\n", *nested(section, schema, f"{name}.")]
        if name == "data":
            from trebuchet.launcher.schema import Source

            out += [
                "\nEach entry of `data.train` and `data.eval`; a path alone is `{path: PATH}`:\n\n",
                table(Source, schema, ""),
            ]
    return out


def nested(section: type[BaseModel], schema: dict[str, Any], prefix: str) -> list[str]:
    """A table of the section, and tables without a head of those inside it."""
    out = [table(section, schema, prefix)]
    for name, field in section.model_fields.items():
        if inner := section_of(field.annotation):
            for part in nested(inner, schema, f"{prefix}{name}."):
                out.append(part.split("\n", 2)[2] if part.startswith("| key") else part)
    return out


def table(section: type[BaseModel], schema: dict[str, Any], prefix: str) -> str:
    properties = schema["$defs"][section.__name__]["properties"] if section is not TrainConfig else schema["properties"]
    lines = ["| key | values | default | |", "| --- | --- | --- | --- |"]
    for name, value in properties.items():
        field = section.model_fields[name]
        if section_of(field.annotation):
            continue
        default = (
            "`runs/NAME`"
            if name == "output"
            else "required"
            if field.is_required()
            else show(field.get_default(call_default_factory=True))
        )
        lines.append(f"| `{prefix}{name}` | {values(value)} | {default} | {value.get('description', '')} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def values(value: dict[str, Any]) -> str:
    if "enum" in value:
        return ", ".join(f"`{v}`" for v in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "$ref" in value:
        return "section"
    for arms in ("anyOf", "oneOf"):
        if arms in value:
            return " or ".join(dict.fromkeys(values(arm) for arm in value[arms] if arm.get("type") != "null"))
    if value.get("type") == "array":
        items = value.get("items", {})
        return f"list of {values(items)}" if items else "list"
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {value[key]}" for key, sign in limits.items() if key in value)
    kind = {
        "string": "text",
        "integer": "integer",
        "number": "number",
        "boolean": "true or false",
        "object": "mapping",
    }.get(value.get("type", ""), "")
    return f"{kind} {bounds}".strip()


def show(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, tuple)):
        return ", ".join(map(str, default)) or "empty"
    return "empty" if default == {} else f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


if __name__ == "__main__":
    main()
