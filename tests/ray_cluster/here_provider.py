"""Machines for Ray's own launcher that are folders of this one: its commands run here instead of through SSH, all else is Ray's.

`ray down` runs `ray stop` on a machine, which ends every Ray there; on a machine that is a folder it ends what was started for it.
Loaded by `ray up` and by the head's monitor by its name, so nothing of the tests is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider

MARK = "HERE_MACHINE"


class Here(NodeProvider):
    """A machine is FOLDER/N with its tags in tags.json; N is what Ray knows it by instead of an address, which all share."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str):
        super().__init__(provider_config, cluster_name)
        self.folder = Path(provider_config["folder"])

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        found = {file.parent.name: json.loads(file.read_text()) for file in sorted(self.folder.glob("*/tags.json"))}
        return [name for name, tags in found.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return (self.folder / node_id / "tags.json").exists()

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.folder / node_id / "tags.json").read_text())
        return found

    def internal_ip(self, node_id: str) -> str:
        return node_id

    external_ip = internal_ip

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        for _ in range(count):
            number = 1 + max((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), default=0)
            (self.folder / str(number)).mkdir()
            self.set_node_tags(str(number), tags)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        file = self.folder / node_id / "tags.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(before | tags))
        os.replace(beside, file)

    def terminate_node(self, node_id: str) -> None:
        (self.folder / node_id / "tags.json").unlink(missing_ok=True)
        end(self.folder / node_id)

    def get_command_runner(self, log_prefix: str, node_id: str, *arguments: Any, **more: Any) -> CommandRunnerInterface:
        return Shell(self.folder / node_id, self.provider_config["environment"])


class Shell(CommandRunnerInterface):
    def __init__(self, machine: Path, environment: dict[str, str]):
        self.machine, self.environment = machine, environment

    def run(
        self, cmd: str | None = None, timeout: int = 120, exit_on_fail: bool = False, with_output: bool = False,
        environment_variables: dict[str, object] | None = None, **more: Any,
    ) -> str:  # fmt: skip
        if cmd and cmd.strip().endswith("ray stop"):
            end(self.machine)
            return ""
        told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (environment_variables or {}).items()}
        environment = {**os.environ, **self.environment, "HOME": str(self.machine), MARK: self.machine.name, **told}
        with (self.machine / "log").open("ab") as log:
            out = subprocess.PIPE if with_output else log
            done = subprocess.run(
                ["bash", "-c", cmd or "true"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                check=True,
            )
        return done.stdout.decode() if with_output else ""

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        there = Path(target.replace("~", str(self.machine), 1))
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, there)

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        shutil.copy(source.replace("~", str(self.machine), 1), target)

    def remote_shell_command_str(self) -> str:
        return f"cd {self.machine}"


def end(machine: Path) -> None:
    """Everything that runs for a machine, by the mark in its environment and its folder as home."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == machine.name and environment.get("HOME") == str(machine):
                process.kill()
