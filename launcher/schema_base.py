"""What every section of the YAML is made of."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be absent (`Section | None`); None for every other field."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    inside = [section_of(arm) for arm in get_args(annotation)]
    found = [section for section in inside if section]
    return found[0] if len(found) == 1 and len(inside) == 2 and type(None) in get_args(annotation) else None


def yaml_bool(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` or `off` as a boolean; give the word back."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
