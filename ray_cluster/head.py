"""The head of a cluster, watched: starts it, writes down where it listens, ends every node with it.

    python -m trebuchet.ray_cluster.head STATE_FOLDER [SCRATCH]

Runs as a process of this machine or as a Slurm job, whichever `cluster up` chose. Ends on SIGTERM, or when the head ends. A
SIGKILL leaves no one to clean up: then nodes that lose contact end themselves after HEAD_LOST_S.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from .processes import end_process, write_process
from .rest import answers
from .state import HEAD_ID, HEAD_LOST_S, HEAD_TYPE, WORKER_TYPE, ClusterFolder, authentication, ray_program

START_S = 90.0
UPDATE_S = 2  # between two decisions of the autoscaler; its own 5 s are most of the time that a new node takes here


def main(state: str, scratch: str | None = None) -> int:
    """`scratch` is removed by whoever gave it; without one a new folder is made, which `cluster down` removes."""
    folder = ClusterFolder(Path(state))
    stopped = _StopFlag()
    ports = dict(zip(("gcs", "dashboard", "client", "metrics", "agent"), free_ports(5), strict=True))
    facts = folder.write(scratch=scratch or tempfile.mkdtemp(prefix="tr-"))
    if facts["host"] is None:  # in a Slurm job: the address by which the other nodes know this one
        facts = folder.write(host=os.environ["TREBUCHET_HEAD_HOST"])
    address = f"{facts['host']}:{ports['gcs']}"
    # Nodes read where to join from the facts; the head's own monitor may start one before `ray start` returns.
    folder.write(address=address, supervisor=os.getpid(), dashboard=f"http://{facts['host']}:{ports['dashboard']}")
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            head_command(folder, facts, ports), env=head_environment(folder, ports), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    write_process(folder.root / "head.json", process.pid)
    try:
        ready = False
        deadline = time.monotonic() + START_S
        while process.poll() is None and not stopped.wished:
            if not ready and answers(folder):
                ready = True
                folder.write(ready=True)
            elif not ready and time.monotonic() > deadline:
                print(f"the head did not answer within {START_S:.0f} s; see {folder.log}", file=sys.stderr)
                return 1
            time.sleep(0.2 if not ready else 0.5)
        return 0 if stopped.wished else 1
    finally:
        end_process(json.loads((folder.root / "head.json").read_text(encoding="utf-8")))  # first: it starts nodes
        end_nodes(folder)


def end_nodes(folder: ClusterFolder) -> None:
    """Every node of the cluster, whatever state its autoscaler was in."""
    provider = provider_of(folder)
    provider.terminate_nodes(provider.non_terminated_nodes({}))


def provider_of(folder: ClusterFolder) -> Any:
    import importlib

    config = yaml.safe_load(folder.autoscaling.read_text(encoding="utf-8"))["provider"]
    module, _, name = config["module"].rpartition(".")
    return getattr(importlib.import_module(module), name)(config, folder.name)


def autoscaling(
    folder: ClusterFolder, *, module: str, resources: dict[str, float], least: int, most: int, idle_s: float
) -> dict[str, Any]:
    """What Ray's autoscaler reads. The empty keys are those that `ray up` would fill in; without them it refuses the file."""
    empty_lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
        "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
    )  # fmt: skip
    return {
        "cluster_name": folder.name,
        "provider": {
            "type": "external",
            "module": module,
            "state_folder": str(folder.root),
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "max_workers": most,
        "upscaling_speed": 10,
        "idle_timeout_minutes": idle_s / 60,
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            WORKER_TYPE: {"resources": resources, "node_config": {}, "min_workers": least, "max_workers": most},
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
        **{key: [] for key in empty_lists},
    }


def head_command(folder: ClusterFolder, facts: dict[str, Any], ports: dict[str, int]) -> list[str]:
    """No CPUs and no GPUs: drivers run on the head, ranks never do. The agent, which starts jobs, has a port of its own: Ray's is
    always 52365, and the second cluster of a machine would take no job. No process that sends what workers print to their drivers: no
    driver of ours listens, and ranks have logs in their run's folder."""
    return [
        *ray_program(), "start", "--head", "--block", f"--node-ip-address={facts['host']}", f"--port={ports['gcs']}",
        "--num-cpus=0", "--num-gpus=0", f"--temp-dir={facts['scratch']}/h", f"--object-store-memory={facts['object_store_bytes']}",
        "--include-dashboard=true", f"--dashboard-host={facts['host']}", f"--dashboard-port={ports['dashboard']}",
        f"--ray-client-server-port={ports['client']}", f"--dashboard-agent-listen-port={ports['agent']}",
        f"--autoscaling-config={folder.autoscaling}", "--disable-usage-stats", "--include-log-monitor=false",
    ]  # fmt: skip


def head_environment(folder: ClusterFolder, ports: dict[str, int]) -> dict[str, str]:
    return {
        **os.environ,
        **authentication(folder.token),
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "AUTOSCALER_UPDATE_INTERVAL_S": str(UPDATE_S),
        "AUTOSCALER_METRIC_PORT": str(ports["metrics"]),
        # A dead node is noticed after 5 s and not after 17. Nodes read the next one themselves.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "4000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_LOST_S),
        # Ray 2.60 drains a head that is told to end like a node, for 30 s: it has nowhere to move its jobs to, and their nodes end anyway.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class _StopFlag:
    def __init__(self) -> None:
        self.wished = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.wished = True


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
