"""JobSpec and site settings -> the text of a job script. Pure: nothing is read, nothing is run.

The script can be read by a cluster's admin and submitted by hand with `sbatch`. One task per rank through srun, so
that signals reach the ranks themselves; each rank learns its number from SLURM_PROCID inside the task, never on the
batch host. Before and after the ranks `slurm/attempt.py` keeps the run's record and decides whether the job requeues
itself.

Left out: submission (scheduler.py), and any secret. Tokens travel as names of files that are read on the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from ..launcher.job import JobSpec
from ..launcher.run_folder import SCHEDULER_LOG
from .quoting import LITERAL, assign, one_line, path, raw, word
from .site import Container, Site

TASK = """\
# Each task expands this itself: on the batch host SLURM_PROCID is 0, and every rank would be rank 0.
# shellcheck disable=SC2016
task='
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  caches={caches}/trebuchet-$UID  # compiled kernels stay on the node and serve the next attempt
  mkdir -p -m 700 "$caches" && [ -O "$caches" ] || {{ echo "$caches is not a folder of ours" >&2; exit 1; }}
  export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor CUDA_CACHE_PATH=$caches/cuda
  exec "$@"'
"""

MEETING = """\
# The ranks know when their time ends (Slurm says so itself since 23.02) and save before, however long a step takes by then.
end=$(scontrol show job "$job" --oneliner | grep -o ' EndTime=[^ ]*')
SLURM_JOB_END_TIME=$(date --date="${end#*=}" +%s 2>/dev/null)
export SLURM_JOB_END_TIME

# The ranks meet on the first node, by the address Slurm knows it by, at a port that follows from the job id.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$(head -n 1 <<<"$nodes")" --oneliner | grep -o ' NodeAddr=[^ ]*')
export MASTER_ADDR=${MASTER_ADDR#*=} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
TREBUCHET_NODES=$(paste -sd, <<<"$nodes")  # so that one from which no rank comes can be named
export TREBUCHET_NODES
"""

DECIDE = """\
read -r verdict word <<<"$(facts | attempt end "$run" "$status" "$warning_s" "$restarts")"
case $verdict in
  requeue)  # saved in time, or ended by nobody's fault: go on under the same id
    trap "exit 0" TERM  # which is what a requeued script gets
    scontrol requeue "$job" && exit 0
    ;;
  avoid)    # the same on other nodes than $word; the SIGTERM of the requeue may end the command that runs when it comes
    again() { "$@" || "$@" || "$@"; }
    scontrol requeuehold "$job"
    again scontrol update JobId="$job" ExcNodeList="$word"
    again scontrol release "$job" && exit 0
    ;;
  exit)
    exit "$word"
    ;;
  *)        # ended from outside before it could be decided
    exit 1
    ;;
esac
echo "the job could not be requeued; go on with: trebuchet resume $(printf %q "$run")" >&2
exit 1
"""


@dataclass(frozen=True)
class Array:
    """The runs of one array: `RUN_FOLDER/trials/NNN` by the task's number, so many digits at least."""

    indices: str  # as --array takes them: 0-3,7
    parallel: int
    digits: int = 3

    def __str__(self) -> str:
        return f"{self.indices}%{self.parallel}"


def render(spec: JobSpec, site: Site, python: str, *, array: Array | None = None, recorded: bool = True) -> str:
    """The whole script. `python` is the interpreter of the submitting side, used when the site names no other.

    `array`: the job is many runs below the folder, and each task goes into its own.

    `recorded`: the job is a run with a record and may requeue itself; without, it ends with the exit code of its ranks.
    """
    parts = [
        "#!/bin/bash\n" + _headline(spec),
        "\n".join(f"#SBATCH {line}" for line in directives(spec, site, array=array)) + "\n",
        _enter(spec, array),
        site_lines(site),
        _environment(spec, site, array),
        MEETING,
        TASK.format(caches=_node_local(site)),
        _programs(site, python, recorded=recorded),
        _ranks(spec, site, recorded=recorded),
        DECIDE if recorded else "",
    ]
    return "\n".join(part for part in parts if part)


def directives(spec: JobSpec, site: Site, *, array: Array | None = None) -> list[str]:
    """The #SBATCH options in the order they are written, without the word #SBATCH."""
    gpus = f"{site.gpu_type}:{spec.gpus_per_node}" if site.gpu_type else str(spec.gpus_per_node)
    memory = {"mem": site.memory, "exclusive": True if site.exclusive else None}
    options: dict[str, str | bool | None] = {
        "job-name": one_line(spec.name),
        "account": site.account,
        "partition": ",".join(site.partition),
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "exclude": ",".join(site.exclude),
        "nodelist": ",".join(site.nodelist),
        "nodes": str(spec.nodes),
        "ntasks-per-node": str(spec.tasks_per_node),
        "gpus-per-node": gpus if spec.gpus_per_node and site.gpu_request == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if spec.gpus_per_node and site.gpu_request == "gres" else None,
        "cpus-per-task": str(site.cpus_per_task or spec.cpus_per_task or "") or None,
        **memory,
        "time": site.time,
        "array": str(array) if array else None,
        "output": output(spec.run_folder, array),
        "open-mode": "append",
        "requeue" if site.requeue else "no-requeue": True,
        "signal": f"USR1@{site.warning_s or spec.warning_s}",
        "export": "NONE",
    }
    written = [
        f"--{name}" if value is True else f"--{name}={word(str(value))}" for name, value in options.items() if value
    ]
    return written + [raw(line) for line in site.extra]


def output(run_folder: Path, array: Array | None = None) -> str:
    """The log's path for #SBATCH. A name that cannot stand there (a line break, %, a backslash) is left to the script, which can
    quote it; Slurm expands % and backslashes in relative paths too, because it puts the folder before them."""
    if not LITERAL.fullmatch(str(run_folder)):
        return "/dev/null"
    inside = f"trials/%{array.digits}a/" if array else ""
    return f"{run_folder}/{inside}{SCHEDULER_LOG}"


def _headline(spec: JobSpec) -> str:
    ranks = spec.nodes * spec.tasks_per_node
    kind = "one per GPU" if spec.gpus_per_node else "on the CPU"
    size = f"{ranks} rank{'s' if ranks > 1 else ''} {kind} on {spec.nodes} node{'s' if spec.nodes > 1 else ''}"
    by_hand = one_line(quote(str(spec.run_folder / "job.sh")))
    return f"# {one_line(spec.name)}: {size}.\n# Written by trebuchet. By hand: sbatch {by_hand}\n"


def _enter(spec: JobSpec, array: Array | None) -> str:
    lines = [assign("run", str(spec.run_folder)), "job=$SLURM_JOB_ID"]
    if array:
        lines[1:] = [
            f'run=$run/trials/$(printf %0{array.digits}d "$SLURM_ARRAY_TASK_ID")',
            "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # this task; one of the tasks has the id of the whole array",
        ]
    lines.append('cd "$run" || exit 1')
    if output(spec.run_folder) == "/dev/null":
        lines.append(f"exec >>{SCHEDULER_LOG} 2>&1  # the folder's name cannot stand in an #SBATCH line")
    return "\n".join([*lines, ""])


def site_lines(site: Site) -> str:
    """Modules and environments; a line that fails ends the job before anything is computed."""
    lines = [*site.setup]
    if site.modules:
        lines += [
            "# shellcheck disable=SC1091",
            "command -v module >/dev/null || source /etc/profile",
            *(f"module load {quote(m)}" for m in site.modules),
        ]
    if site.venv:
        lines += ["# shellcheck disable=SC1090,SC1091", f"source {path(site.venv + '/bin/activate')}"]
    if site.conda:
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {path(site.conda)}"]
    if not lines:
        return ""
    return "\n".join(["# What the site asks for.", "set -e", *lines, "set +e", ""])


def _environment(spec: JobSpec, site: Site, array: Array | None = None) -> str:
    values = dict(spec.environment) | caches(site)
    if spec.gpus_per_node:
        values |= {"NCCL_DEBUG": "WARN", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}
    values |= site.environment
    lines = [
        "# srun hands on what is exported here; the shell that submitted has no part in it (--export=NONE).",
        "export SLURM_EXPORT_ENV=ALL",
    ]
    lines += [assign(name, value, export=True) for name, value in sorted(values.items())]
    if array and "WANDB_RUN_ID" in values:
        lines.append("WANDB_RUN_ID=$WANDB_RUN_ID-$SLURM_ARRAY_TASK_ID")
    if spec.gpus_per_node:
        lines.append('export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$run/logs/nccl-trace-"')
    return "\n".join([*lines, *secrets(site), ""])


def caches(site: Site) -> dict[str, str]:
    return (
        {} if not site.cache else {"HF_HOME": f"{site.cache}/huggingface", "TREBUCHET_CACHE": f"{site.cache}/trebuchet"}
    )


def secrets(site: Site) -> list[str]:
    """Read on the node, where they are needed."""
    return [f"{name}=$(<{path(file)}) || exit 1; export {name}" for name, file in sorted(site.secrets.items())]


def _programs(site: Site, python: str, *, recorded: bool) -> str:
    """Shell functions: `attempt` keeps the record, `facts` is what Slurm knows of the job and its nodes."""
    own = site.venv or site.conda or site.container
    lines = [f"python={path(site.python) if site.python else 'python3' if own else quote(python)}"]
    box = site.container
    if box is not None and box.runtime == "apptainer":
        lines.append(f"box=(apptainer exec --nv {_options(_bind(box))} {path(box.image)})")
        prefix = '"${box[@]}" '
    elif box is not None:
        image = [
            f"--container-image={quote(box.image)}",
            *(["--container-mounts=" + quote(",".join(box.mounts))] if box.mounts else []),
        ]
        lines.append(f"box=({' '.join([*image, _options(box.options)]).strip()})")
        prefix = 'srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${box[@]}" '
    else:
        prefix = ""
    if not recorded:
        return "\n".join([*lines, ""])
    lines += [
        f'attempt() {{ {prefix}"$python" -m trebuchet.slurm.attempt "$@"; }}',
        "facts() {",
        '  date "+Now=%FT%T"',
        '  scontrol show job "$job" --oneliner',
        '  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/^/Allocated=/"',
        '  sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format="Node=%N=%t"',
        "}",
        "",
    ]
    return "\n".join(lines)


def _ranks(spec: JobSpec, site: Site, *, recorded: bool) -> str:
    cpus = site.cpus_per_task or spec.cpus_per_task
    options = ["--kill-on-bad-exit=1", "--label"]
    if cpus:  # srun does not take it over from sbatch since Slurm 22.05
        options.append(f"--cpus-per-task={cpus}")
    options += [raw(line, shell=True) for line in site.srun]
    box = site.container
    inside = '"${box[@]}" ' if box is not None and box.runtime == "apptainer" else ""
    if box is not None and box.runtime == "pyxis":
        options.append('"${box[@]}"')
    arguments = " ".join('"$run"' if a == str(spec.run_folder) else quote(a) for a in spec.arguments)
    srun = (
        f'srun {" ".join(options)} \\\n  bash -c "$task" rank {inside}"$python" -m {quote(spec.module)} {arguments}\n'
    )
    if not recorded:
        return srun
    limits = f"warning_s={site.warning_s or spec.warning_s} restarts={site.restarts if site.requeue else 'none'}"
    return (
        "trap : TERM USR1  # the script outlives the ranks: it writes the record and requeues\n"
        f'facts | attempt begin "$run" || exit\n{srun}status=$? {limits}\n'
    )


def _bind(box: Container) -> tuple[str, ...]:
    return (*(f"--bind={m}" for m in box.mounts), *box.options)


def _options(words: tuple[str, ...]) -> str:
    return " ".join(quote(word) for word in words)


def _node_local(site: Site) -> str:
    """Inside the single quotes of TASK, where only a plain path can stand."""
    if site.node_local is None:
        return "${TMPDIR:-/tmp}"
    return quote(site.node_local).replace("'", "'\\''")
