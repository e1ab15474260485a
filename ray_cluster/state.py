"""The folder of a cluster that `trebuchet cluster up` started: where its head is, its token, its nodes. No ray in here.

CACHE/ray/NAME/
    cluster.json        what was started, and since the head answers, where it listens
    token               authentication, mode 600
    autoscaling.yaml    what Ray's autoscaler reads before every decision
    nodes/ID.json       a node that is a process of this machine
    head.log  nodes/ID.log
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..launcher.errors import ClusterError
from ..launcher.record import write_atomically

HEAD_ID, HEAD_TYPE, WORKER_TYPE = "head", "head", "worker"
# Lost contact with the head after which a node ends itself. Ray's own 60 s keep GPUs that nobody can reach.
HEAD_LOST_S = 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class ClusterFolder:
    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def autoscaling(self) -> Path:
        return self.root / "autoscaling.yaml"

    @property
    def log(self) -> Path:
        return self.root / "head.log"

    @property
    def nodes(self) -> Path:
        return self.root / "nodes"

    @property
    def facts(self) -> Path:
        return self.root / "cluster.json"

    @property
    def exists(self) -> bool:
        return self.facts.exists()

    def read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.facts.read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            raise ClusterError(
                f"the Ray cluster {self.name} is not up; start it with `trebuchet cluster up {self.name}`."
            ) from None
        except ValueError as error:
            raise ClusterError(f"{self.facts} cannot be read: {error}") from None

    def write(self, **changes: Any) -> dict[str, Any]:
        facts = (self.read() if self.exists else {}) | changes
        write_atomically(self.facts, json.dumps(facts, indent=1) + "\n")
        return facts

    def create(self, **facts: Any) -> None:
        """The folder, a new token that only its owner can read, and the first facts."""
        self.nodes.mkdir(parents=True)
        self.root.chmod(0o700)
        handle = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        self.write(name=self.name, address=None, dashboard=None, **facts)

    def remove(self, *, keep_log: bool = False) -> None:
        """All of it, and what lies in the scratch folder; after a start that failed all but the logs."""
        with contextlib.suppress(ClusterError):
            if scratch := self.read().get("scratch"):
                shutil.rmtree(scratch, ignore_errors=True)
        if not keep_log:
            shutil.rmtree(self.root, ignore_errors=True)
            return
        # The facts last: while they are there, the next `up` takes away what this did not come to.
        left = [path for path in self.root.iterdir() if path not in (self.log, self.root / "logs")]
        for path in sorted(left, key=lambda path: path == self.facts):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def cluster_folder(name: str) -> ClusterFolder:
    """By the cluster's name: its word in cluster_configs/, or the stem of its file."""
    if not NAME.fullmatch(name):
        raise ClusterError(f"'{name}' cannot name a Ray cluster: letters, digits, dots, dashes, at most 40 of them.")
    root = os.environ.get("TREBUCHET_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/trebuchet"
    return ClusterFolder(Path(root).expanduser() / "ray" / name)


def authentication(token: Path) -> dict[str, str]:
    """What head, nodes, drivers and clients all need. Without RAY_AUTH_MODE each of them decides by what ran before."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def ray_program() -> list[str]:
    """The `ray` of this very Python, whatever PATH says."""
    return [sys.executable, "-m", "ray.scripts.scripts"]
