"""The long options that `sbatch` and `srun` know, so that a misspelt one is refused here, with the nearest, and not
by a queue.

Source: the manual pages of Slurm 22.05 and the options that 23.02 to 24.11 added. A test compares the list with
`sbatch --help` of the installed Slurm. Left out: short options and values; `sbatch` checks those itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..launcher.errors import did_you_mean

_BOTH = """
account acctg-freq bb bbf begin chdir cluster-constraint clusters comment constraint container container-id contiguous
core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error
exclude exclusive export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags help hint hold input job-name licenses mail-type mail-user mcs-label mem mem-bind
mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
ntasks-per-node ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe partition power prefer
priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal sockets-per-node spread-job
stepmgr switches thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid usage use-min-nodes
verbose version wait wckey
"""
_SBATCH = """
array batch consolidate-segments get-user-env ignore-pbs kill-on-invalid-dep no-requeue parsable spread-segments
test-only wait-all-nodes wrap
"""
_SRUN = """
bcast bcast-exclude compress cpu-bind disable-status epilog exact external-launcher het-group immediate interactive
jobid kill-on-bad-exit label mpi msg-timeout multi-prog no-allocate overlap preserve-env prolog pty quit-on-interrupt
relative send-libs slurmd-debug task-epilog task-prolog threads treewidth unbuffered
"""
SBATCH = frozenset(_BOTH.split()) | frozenset(_SBATCH.split())
SRUN = frozenset(_BOTH.split()) | frozenset(_SRUN.split())

# What the plan, the run folder or a key of its own decides: setting it a second time would start another job than the
# plan's.
DECIDED = {
    "array": "the sweep",
    "chdir": "the run folder",
    "error": "the run folder",
    "export": "the script; put variables under slurm.environment",
    "export-file": "the script; put variables under slurm.environment",
    "gpus": "the plan",
    "gpus-per-node": "the plan",
    "het-group": "the plan; one run takes nodes of one kind, so there are no heterogeneous jobs",
    "gpus-per-task": "the plan; every task sees the GPUs of its node and takes the one of its local rank",
    "job-name": "the run folder",
    "kill-on-bad-exit": "the script",
    "no-requeue": "slurm.requeue",
    "nodes": "the plan",
    "ntasks": "the plan",
    "ntasks-per-node": "the plan",
    "open-mode": "the script",
    "output": "the run folder",
    "parsable": "the script",
    "requeue": "slurm.requeue",
    "signal": "slurm.warning_s",
    "test-only": "--dry-run",
    "wait": "`trebuchet logs -f`",
    "wrap": "the script",
}


def problems(lines: Iterable[str], known: frozenset[str], program: str) -> list[str]:
    """What is wrong with raw options such as `--gres-flags=enforce-binding`, one sentence each."""
    out = []
    for line in lines:
        word, equals, value = line.partition("=")
        name = word.removeprefix("--")
        if not word.startswith("--") or any(c.isspace() for c in word):
            out.append(f"{line!r} is not a long option; write --name or --name=value")
        elif name not in known:
            out.append(f"{program} has no option --{name}{did_you_mean(name, known)}")
        elif name in DECIDED:
            out.append(f"--{name} is decided by {DECIDED[name]}")
        elif equals and any(ord(c) < 32 for c in value):
            out.append(f"--{name} holds a line break or another control character")
    return out
