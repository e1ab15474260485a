"""The head's dashboard over HTTP: nodes, jobs. Without ray, so that a login node needs none and a question takes milliseconds.

Ray's own clients read their token when ray is first imported, whatever is set later; here it goes with each request. Sources: the
Ray Jobs REST API (docs.ray.io, cluster/running-applications/job-submission/rest) and the state API behind `ray list`.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..launcher.errors import ClusterError, SchedulerRefused
from .state import ClusterFolder

TIMEOUT_S = 20.0
AGENT_S = 90.0  # for the agent of a head that has just come up


@dataclass(frozen=True)
class Dashboard:
    name: str
    url: str
    token: Path | None

    def ask(self, path: str, body: Any = None, *, method: str | None = None, timeout_s: float = TIMEOUT_S) -> Any:
        """The JSON of an answer. Raises ClusterError when nobody answers, SchedulerRefused with the head's words on a no."""
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token.read_text().strip()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refused:
            words = refused.read().decode(errors="replace").strip().splitlines()
            raise SchedulerRefused(
                f"the head of {self.name} refused {path}: {refused.code} {words[-1] if words else refused.reason}"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(f"the head of {self.name} does not answer at {self.url}: {reason}") from None

    def nodes(self) -> list[dict[str, Any]]:
        found = self.ask(f"/api/v0/nodes?limit=10000&timeout={TIMEOUT_S:.0f}")
        rows: list[dict[str, Any]] = found["data"]["result"]["result"]
        return rows

    def submit(
        self, entrypoint: str, submission_id: str, environment: dict[str, str], metadata: dict[str, str]
    ) -> None:
        body = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": environment},
            "metadata": metadata,
        }
        deadline = time.monotonic() + AGENT_S
        while True:
            try:
                self.ask("/api/jobs/", body, method="POST")
                return
            # A head answers before its agent, which starts jobs, is there; nothing has begun.
            except SchedulerRefused as refused:
                if "No available agent" not in str(refused) or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """What is known of a job; None for one that the head does not know."""
        try:
            found: dict[str, Any] = self.ask(f"/api/jobs/{urllib.parse.quote(submission_id, safe='')}")
        except SchedulerRefused as refused:
            if " 404 " in str(refused):
                return None
            raise
        return found

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Jobs by their submission id; plain drivers, which have none, are left out."""
        return {job["submission_id"]: job for job in self.ask("/api/jobs/") if job.get("submission_id")}

    def stop(self, submission_id: str) -> None:
        self.ask(f"/api/jobs/{urllib.parse.quote(submission_id, safe='')}/stop", {}, method="POST")

    def log(self, submission_id: str) -> str:
        return str(self.ask(f"/api/jobs/{urllib.parse.quote(submission_id, safe='')}/logs")["logs"])


def of_cluster(folder: ClusterFolder) -> Dashboard:
    return Dashboard(folder.name, folder.read()["dashboard"], folder.token)


def answers(folder: ClusterFolder) -> bool:
    """Whether the dashboard takes jobs."""
    try:
        of_cluster(folder).ask("/api/version", timeout_s=5)
    except (ClusterError, SchedulerRefused):
        return False
    return True
