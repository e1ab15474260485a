"""Words of users and sites as they may stand in a job script: in shell lines, and in #SBATCH lines, which no shell reads."""

from __future__ import annotations

import re
from shlex import quote

PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")
# A path that stands in an #SBATCH line literally: no line break, none of its quotes and escapes, no %j.
LITERAL = re.compile(r"[^\x00-\x1f\x7f\\%\"'#]+")


def assign(name: str, value: str, *, export: bool = False) -> str:
    line = f"{'export ' if export else ''}{name}={quote(value)}"
    return (
        f"# shellcheck disable=SC2016  # a name with a dollar sign, taken literally\n{line}"
        if "$" in value or "`" in value
        else line
    )


def path(path: str) -> str:
    """Quoted, with a leading ~ left to the shell of the node."""
    return f"~/{quote(path[2:])}" if path.startswith("~/") else quote(path)


def word(value: str) -> str:
    """A value of an #SBATCH line. sbatch splits at blanks, takes quotes off, and drops a backslash before a
    character."""
    return value if PLAIN.fullmatch(value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def raw(line: str, *, shell: bool = False) -> str:
    name, equals, value = line.partition("=")
    return f"{name}{equals}{quote(value) if shell and value else word(value) if value else ''}"


def one_line(text: str) -> str:
    """Line breaks and other control characters as blanks: names are for people, and #SBATCH lines end at a line
    break."""
    return re.sub(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+", " ", text).strip() or "trebuchet"
