"""The jobs of a Ray cluster inside Slurm: one for its head, one for each node; their scripts, and what the queue knows of them.

A job that loses the head ends itself (ray_cluster/state.py, HEAD_LOST_S). Left out: when a node is wanted (ray_nodes.py) and what a
head does (ray_cluster/head.py).
"""

from __future__ import annotations

import json
import sys
import time
from shlex import quote
from typing import Any

from ..launcher.cluster import Cluster, NodeGroup
from ..launcher.errors import ClusterError
from ..launcher.job import JobSpec, JobState
from ..ray_cluster.state import HEAD_LOST_S, ClusterFolder, authentication
from . import sbatch, states
from .quoting import assign
from .site import Site, build_site

STOP_S = 60.0
DRAIN_S = 20  # before a preempted node goes; sites give 30 s and more (GraceTime, KillWait)
# A scheduler's early warning goes to a job's steps and not to its script, and to every process of a step. So ray runs under the
# script, and a step that only waits passes the signal on (seen on Slurm 22.05: ray then drains, and otherwise drops dead).
RELAY = """\
export KEPT=$!
trap 'kill -TERM "$KEPT"' TERM
# shellcheck disable=SC2016
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap bash -c 'trap "kill -TERM $KEPT" TERM; sleep infinity & wait' &
while kill -0 "$KEPT" 2>/dev/null; do wait "$KEPT"; status=$?; done
exit "$status"
"""
# In /tmp whatever TMPDIR says: the path of a socket has room for 107 bytes, and Ray's own part takes most of them. The lock is the
# script's and goes with it, so that a job which was killed (a lost node, the end of KillWait) leaves nothing for longer than until the
# next one on its node.
SCRATCH = """\
for old in /tmp/tr-??????; do  # of jobs of ours that were killed: nobody holds their lock
  [ ! -L "$old" ] && [ -O "$old" ] && [ -f "$old/lock" ] && flock --nonblock "$old/lock" rm -rf "$old"
done
scratch=$(mktemp -d /tmp/tr-XXXXXX) || exit 1  # short, because it holds sockets
trap 'rm -rf "$scratch"' EXIT
exec 9>"$scratch/.lock" && flock 9 && mv "$scratch/.lock" "$scratch/lock"
"""
HOST = """\
host=$(scontrol show node "$SLURMD_NODENAME" --oneliner | grep -o ' NodeAddr=[^ ]*')
export TREBUCHET_HEAD_HOST=${host#*=}
"""


def render_head(folder: ClusterFolder, site: Site, python: str) -> str:
    """The script of the head's job. Pure."""
    state = assign("state", str(folder.root)) + "\n"
    spec = _spec(folder, NodeGroup(nodes=1, cores=2, host_memory_gib=4), {})
    start = state + '"$python" -m trebuchet.ray_cluster.head "$state" "$scratch" &\n'
    return _script(spec, site, python, HOST + SCRATCH + start)


def render_node(
    folder: ClusterFolder, group: NodeGroup, site: Site, python: str, node_id: str, resources: dict[str, float]
) -> str:
    """The script of one node's job. Pure but for the head's address, which is read from the cluster's facts."""
    facts = folder.read()
    environment = {
        **authentication(folder.token),
        "RAY_CLOUD_INSTANCE_ID": node_id,
        "RAY_NODE_TYPE_NAME": "worker",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_LOST_S),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
    }
    extra = {k: v for k, v in resources.items() if k not in ("CPU", "GPU", "memory", "object_store_memory")}
    start = (
        f'"$python" -m ray.scripts.scripts start --address={quote(facts["address"])} --block --node-name={quote(node_id)} \\\n'
        f'  --temp-dir="$scratch/n" --num-cpus={int(resources.get("CPU", 1))} --num-gpus={int(resources.get("GPU", 0))} \\\n'
        f"  --object-store-memory={facts['object_store_bytes']} --resources={quote(json.dumps(extra))} --disable-usage-stats \\\n"
        "  --dashboard-agent-listen-port=0 --include-log-monitor=false &\n"
    )
    return _script(_spec(folder, group, environment), site, python, SCRATCH + start)


def _script(spec: JobSpec, site: Site, python: str, start: str) -> str:
    own = site.venv or site.conda
    name = quote(site.python) if site.python else "python3" if own else quote(python)
    return "\n".join(
        [
            "#!/bin/bash\n" + f"# {spec.name}: written by trebuchet for Ray's autoscaler.\n",
            "\n".join(f"#SBATCH {line}" for line in _directives(spec, site)) + "\n",
            sbatch.site_lines(site),
            sbatch._environment(spec.model_copy(update={"gpus_per_node": 0}), site),  # ranks get theirs from their run
            f"python={name}\n{start}{RELAY}",
        ]
    )


def _directives(spec: JobSpec, site: Site) -> list[str]:
    """Those of a run's job, but for what belongs to runs: no warning signal, and a lost node is replaced and not requeued."""
    lines = sbatch.directives(spec, site.model_copy(update={"requeue": False}))
    return [line for line in lines if not line.startswith("--signal=")]


def _spec(folder: ClusterFolder, group: NodeGroup, environment: dict[str, str]) -> JobSpec:
    return JobSpec(
        name=job_name(folder),
        run_folder=folder.root,
        module="",
        arguments=(),
        environment=environment,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=group.gpus_per_node,
        cpus_per_task=group.cores,
    )


def job_name(folder: ClusterFolder) -> str:
    return f"ray-{folder.name}"


def start_head(folder: ClusterFolder, cluster: Cluster) -> None:
    """Hands in the head's job. Raises SchedulerRefused with sbatch's words."""
    site = site_of(cluster.slurm, cluster.name)
    (folder.root / "logs").mkdir(exist_ok=True)
    folder.write(slurm=cluster.slurm, python=sys.executable)
    job = submit(render_head(folder, site, sys.executable), folder, "head")
    folder.write(head_job=job)


def submit(script: str, folder: ClusterFolder, comment: str) -> str:
    file = folder.root / f"job-{comment.partition('&')[0]}.sh"
    file.write_text(script, encoding="utf-8")
    answer = states.call("sbatch", "--parsable", f"--comment={comment}", file.name, cwd=folder.root)
    return answer.strip().partition(";")[0]


def head_alive(folder: ClusterFolder) -> bool:
    """Whether the head's job waits or runs."""
    job = folder.read().get("head_job")
    state = states.states([job]).get(job) if job else None
    return state is not None and not state.ended


def stop(folder: ClusterFolder) -> None:
    """Cancels head and nodes, and returns when the queue holds none of them."""
    states.call("scancel", "--me", f"--name={job_name(folder)}")
    deadline = time.monotonic() + STOP_S
    while jobs(folder):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"jobs of {folder.name} are still in the queue {STOP_S:.0f} s after scancel: {jobs(folder)}"
            )
        time.sleep(0.3)


def jobs(folder: ClusterFolder) -> dict[str, tuple[JobState, str]]:
    """State and comment by job id, of all jobs of this cluster that Slurm has not ended. Raises SchedulerRefused when Slurm does
    not answer: an empty list would make the autoscaler start everything again."""
    text = states.call("squeue", "--noheader", "--me", f"--name={job_name(folder)}", "--format=%A|%T|%k")
    rows = (line.split("|", 2) for line in text.splitlines())
    return {job: (states.to_state(state), comment) for job, state, comment in rows}


def site_of(settings: dict[str, Any], name: str) -> Site:
    site = build_site(settings, name)
    if site.container is not None:
        raise ClusterError(
            f"{name}: Ray nodes in containers are not started by this version; use slurm.venv or slurm.conda."
        )
    return site
