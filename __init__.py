"""Trebuchet weighs a model against the hardware, picks how to fine-tune it, and throws the job at a cluster.

The verbs of the command line are functions here: `plan`, `run`, `submit`, `resume`. Importing this loads none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launcher.api import plan, resume, run, submit

__all__ = ["plan", "resume", "run", "submit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from .launcher import api

        return getattr(api, name)
    raise AttributeError(f"module 'trebuchet' has no attribute {name!r}")
