"""A real Slurm on this machine for the tests: munge, one controller, several slurmd as nodes, plain files as GPUs.

Everything lives in one folder with ports of its own, so that it runs beside another Slurm; `stop` ends the processes
that were started here and no others. Left out: slurmdbd (accounting.py). Without it there
is no sacct, as on many small clusters.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# shellcheck comes along: the golden scripts are held to it, and on a bare machine it would be missing like the rest.
PACKAGES = ("slurm-wlm", "munge", "shellcheck")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmdSpoolDir={root}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=8000
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SchedulerTimeSlice=5
KillWait=5
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=300
JobRequeue=1
RebootProgram=/bin/false
JobCompType=jobcomp/filetxt
JobCompLoc={root}/jobcomp.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=2001
MaxJobCount=20000
GresTypes=gpu
{nodes}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 MaxTime=60 State=UP PreemptMode=REQUEUE GraceTime=60
PartitionName=abrupt Nodes={names} PriorityTier=1 MaxTime=60 State=UP PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes={names} PriorityTier=10 MaxTime=60 State=UP PreemptMode=OFF
PartitionName=gpu Nodes=big PriorityTier=1 State=UP PreemptMode=OFF
{typed}"""


@dataclass
class SlurmCluster:
    root: Path
    nodes: int = 4
    cpus: int = 8
    gpus: int = 2
    typed: tuple[str, ...] = ()  # GPU types of further nodes, one each, in a partition `mixed` of their own
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def start(self) -> None:
        self._configure()
        self._munge()
        self._before_controller()
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.root / "slurm.conf"))
        for name in (*self.names(), "big"):
            self.start_node(name)
        wait_for(
            lambda: self.ask("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == str(self.nodes),
            60,
            "idle nodes",
        )

    def _before_controller(self) -> None:
        """Where accounting.py starts its daemons."""

    def start_node(self, name: str) -> None:
        self._spawn(name, "slurmd", "-D", "-N", name, "-f", str(self.root / "slurm.conf"))

    def kill_node(self, name: str) -> None:
        """What a power cut looks like: the daemon and everything that it started, gone at once."""
        daemon = self.processes.pop(name)
        doomed = [int(pid) for pid in descendants(daemon.pid)]
        steps = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_step_of(p, name, self.root)]
        for pid in [daemon.pid, *steps, *doomed, *(int(p) for s in steps for p in descendants(s))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            self.ask("scancel", "--user=root")
            self.ask("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            wait_for(
                lambda: not self.ask("squeue", "-h").strip(), 30, "jobs to end"
            )  # or their steps wait for a controller
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *command: str, check: bool = True) -> str:
        return subprocess.run(
            command, env=self.environment, check=check, capture_output=True, text=True, timeout=180
        ).stdout

    def state(self, job: str) -> str:
        """The state as squeue spells it; empty when the controller has forgotten the job."""
        return self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).strip()

    def wait_state(self, job: str, *states: str, timeout_s: float = 180) -> str:
        wait_for(
            lambda: self.state(job) in states,
            timeout_s,
            lambda: f"{states}; {self.ask('scontrol', 'show', 'job', job)}",
        )
        return self.state(job)

    def names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + len(self.typed) + 1)]

    def _configure(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "state").mkdir()
        names, kinds = self.names(), ["", *self.typed]
        ports = free_ports(len(names) + 2)
        # One node of the kind that cluster_configs/ray-on-slurm.yaml asks for, in the partition `gpu`.
        big = len(names) * self.gpus
        nodes = [
            f"NodeName=big NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=72 RealMemory=64000 Gres=gpu:4 State=UNKNOWN"
        ]
        gres = [f"NodeName=big Name=gpu File={self.root}/gpu[{big}-{big + 3}]"]
        for number in range(big, big + 4):
            (self.root / f"gpu{number}").touch()
        for i, (name, port) in enumerate(zip(names, ports[2:], strict=True)):
            kind = kinds[max(0, i + 1 - self.nodes)]
            first, last = i * self.gpus, (i + 1) * self.gpus - 1
            for number in range(first, last + 1):
                (self.root / f"gpu{number}").touch()
            nodes.append(
                f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                f"RealMemory=64000 Gres=gpu:{f'{kind}:' if kind else ''}{self.gpus} State=UNKNOWN"
            )
            gres.append(
                f"NodeName={name} Name=gpu {f'Type={kind} ' if kind else ''}File={self.root}/gpu[{first}-{last}]"
            )
        typed = f"PartitionName=mixed Nodes={','.join(names[self.nodes :])} State=UP" if self.typed else ""
        settings = {"root": self.root, "controller_port": ports[0], "typed": typed, "nodes": "\n".join(nodes)}
        text = CONF.format(names=",".join(names[: self.nodes]), **settings)
        (self.root / "slurm.conf").write_text(text, encoding="utf-8")
        (self.root / "gres.conf").write_text("\n".join(gres) + "\n", encoding="utf-8")
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n", encoding="utf-8")

    def _munge(self) -> None:
        folder = self.root / "munge"
        folder.mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        self.root.chmod(0o755)
        folder.chmod(0o755)
        options = [
            f"--{name}={folder}/{name.split('-')[0]}"
            for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        ]
        self._spawn("munged", "runuser", "-u", "munge", "--", "munged", "--foreground", "--force", *options)
        wait_for((folder / "socket").exists, 60, "munged")

    def _spawn(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )


def _end_with_parent() -> None:
    """A test run that is killed leaves no daemon behind (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def descendants(pid: int) -> Iterator[str]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield child
            yield from descendants(int(child))


def _is_step_of(process: Path, node: str, root: Path) -> bool:
    """Whether a process is a slurmstepd of this cluster's `node`; they outlive their slurmd and carry its name in the
    environment."""
    try:
        if "slurmstepd" not in (process / "cmdline").read_text():
            return False
        children = (process / "task" / process.name / "children").read_text().split()
        return any(
            f"SLURMD_NODENAME={node}\0" in Path(f"/proc/{c}/environ").read_text()
            and str(root) in Path(f"/proc/{c}/environ").read_text()
            for c in children
        )
    except OSError:
        return False


def install(programs: Sequence[str] = PROGRAMS, packages: Sequence[str] = PACKAGES) -> str | None:
    """None when Slurm's programs are here or could be installed; else the one line that says why the tests are
    skipped."""
    if os.geteuid() != 0:
        return "the Slurm tests start munged and slurmctld and need root"
    if all(shutil.which(p) for p in programs):
        return None
    if shutil.which("apt-get") is None:
        return "Slurm is not installed and there is no apt-get to install slurm-wlm and munge with"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if done.returncode != 0:
            return f"`{' '.join(command)}` failed: {done.stderr.strip().splitlines()[-1:]}"
    return None
