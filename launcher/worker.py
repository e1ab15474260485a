"""What runs on every rank: reads plan.json, never plans again, prepares the model, trains, evaluates, exports.

    python -m trebuchet.launcher.worker RUN [--until STEP]

Started by accelerate, Slurm or Ray alike; it learns its rank from the environment. Everything a user should hear ends up in
run.json and in one paragraph on rank 0; a traceback goes to the rank's log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import record, started, stopping, together
from .errors import JobFailed, TrebuchetError, UserError
from .plan import Chosen, Plan
from .run_folder import RunFolder

if TYPE_CHECKING:
    from ..training.runtime import Runtime

# Lines of other libraries that are true, expected and of no use to anyone who trains: by logger, how they begin.
HARMLESS = {
    "DeepSpeed": "Setting accelerator to CPU",  # accelerate asks DeepSpeed for its device when it saves a model
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional package of inference kernels
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",  # what LLM.int8 is: activations pass through fp16
}
STOPPED = 75  # EX_TEMPFAIL: stopped at a step boundary with a checkpoint; `resume` goes on


def main(run: str, until: int | None = None) -> int:
    folder = RunFolder(Path(run))
    rank = int(os.environ.get("RANK", "0"))
    stopping.listen()
    folder.logs.mkdir(exist_ok=True)
    if "TREBUCHET_NODES" in os.environ:
        started.mark(folder.logs)
    sys.stderr = tee = _Tee(sys.stderr, folder.log(rank), silent=rank != 0)
    drop_harmless_lines()
    node = None
    try:
        plan = at_this_world(Plan.model_validate_json(folder.plan.read_text(encoding="utf-8")))
        assert plan.chosen is not None
        leave_out(plan.chosen.parallel)
        finished = train(folder, plan, until)
        code, error = (0, None) if finished else (STOPPED, None)
    except TrebuchetError as problem:
        code, error = problem.exit_code, str(problem)
        node = getattr(problem, "node", None)
    except Exception as problem:  # the last line of defence: every failure must reach the record
        make_room(folder)
        with contextlib.suppress(OSError):  # a disk that is full again; the reason in a line needs less
            traceback.print_exc(file=tee.file)
        code, error = 1, f"{describe(problem)} The traceback is in {folder.log(rank)}."
    if error is not None:  # on the screen only the cause, not its echo on other ranks
        print(error, file=tee.file if folder.outcome.exists() else tee)
    if error is not None or rank == 0:
        # The first rank to fail writes; the others fail because it did.
        outcome = {"exit_code": code, "error": error, "rank": rank, "node": node}
        write_outcome(folder, outcome)
    if error is not None:
        together.tell(error)
    together.stop()
    return 0 if code == STOPPED else code  # to whoever started the ranks, a stop that was asked for is no failure


def train(folder: RunFolder, plan: Plan, until: int | None = None) -> bool:
    """True when the run reached its end; False when it stopped early, with a checkpoint or after step `until` without one."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ..training import runtime as rt
    from ..training.watchdog import Watchdog, collective_limit_s, loading_limit_s

    chosen = plan.chosen
    assert chosen is not None
    rt.tune_cpu()
    if "TREBUCHET_NODES" in os.environ:
        check_all_came(folder)
    group: dict[str, Any] = {"timeout": timedelta(seconds=collective_limit_s(plan)), **backend(chosen)}
    accelerator = Accelerator(
        cpu=chosen.device == "cpu",
        log_with=list(plan.config.tracking) or None,
        project_dir=str(folder.trackers),
        kwargs_handlers=[InitProcessGroupKwargs(**group)],
    )
    runtime = rt.Runtime(plan, folder, accelerator)
    if runtime.world > 1:
        together.begin(rt.store(), runtime.rank, runtime.world)
    check_hardware(runtime.world, runtime.device.type, chosen)
    if runtime.world > 1 or "SLURM_JOB_ID" in os.environ:
        check_allocation(runtime, plan)
    accelerator.init_trackers("trebuchet", config=flat(plan.config.model_dump(mode="json")))
    runtime.loading = Watchdog(folder, runtime.rank, runtime.world, loading_limit_s(plan), doing="loading the model")
    runtime.loading.start(0)
    try:
        from ..training.session import Session

        return Session(runtime).run(until)
    finally:
        runtime.loads_on(over=True)
        accelerator.end_training()


def backend(chosen: Chosen) -> dict[str, str]:
    """With parameters in host memory FSDP2 gathers and reduces tensors of both kinds: norms of gradients, shards to be saved. Never run
    on a GPU. Everywhere else accelerate's own choice is right."""
    both = chosen.device == "cuda" and chosen.parallel == "fsdp2" and chosen.offload == "params"
    return {"backend": "cuda:nccl,cpu:gloo"} if both else {}


def at_this_world(plan: Plan) -> Plan:
    """The plan for the ranks that an elastic run has just now. Every other run has the plan's number, or stops."""
    world, chosen = int(os.environ.get("WORLD_SIZE", "1")), plan.chosen
    assert chosen is not None
    if chosen.elastic is None or not chosen.elastic[0] <= world <= chosen.elastic[1]:
        return plan
    return plan.model_copy(update={"chosen": chosen.at_world(world, plan.config.optimization.global_batch_size)})


def leave_out(parallel: str) -> None:
    """Saving a model makes accelerate import DeepSpeed where it is installed, with all that DeepSpeed imports (MLflow), to ask whether the
    model is one of its own; a layout that does not use it has better things to do with 2 s of a core. Only in a process of one run."""
    if parallel != "zero3":
        modules: dict[str, Any] = sys.modules
        modules.setdefault("deepspeed", None)  # what the import system takes for "not there"


def drop_harmless_lines() -> None:
    """Filters on the loggers themselves: everything else that they say still comes through."""

    def unlike(beginning: str) -> Callable[[logging.LogRecord], bool]:
        return lambda entry: not entry.getMessage().startswith(beginning)

    for name, beginning in HARMLESS.items():
        logging.getLogger(name).addFilter(unlike(beginning))
    # PEFT 0.21 asks a transformers 5.23 model by a name of before.
    # FSDP2 sees that log-probabilities leave the model as a view of themselves; nothing of ours writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    # DeepSpeed 0.19 calls torch 2.13 by names of before.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def check_hardware(world: int, device: str, chosen: Chosen) -> None:
    """The plan was made for certain hardware; on other hardware its numbers are wrong, so stop and say so."""
    if world != chosen.ranks:
        raise JobFailed(f"the plan is for {chosen.ranks} ranks and {world} were started; plan again for this hardware.")
    if device != chosen.device:
        raise JobFailed(
            f"the plan is for {chosen.device} and this rank runs on {device}; plan again for this hardware."
        )
    if device == "cuda":
        import torch

        has_gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        if has_gib < chosen.memory.usable_gib * 0.98:
            raise JobFailed(
                f"the plan counts on {chosen.memory.usable_gib:.1f} GiB of GPU memory and this GPU has {has_gib:.1f}; "
                "plan again for this hardware."
            )


def check_all_came(folder: RunFolder) -> None:
    """Before the process group, which would wait for a missing rank without a word. Raises JobFailed with the node."""
    from ..training import roll_call

    absent, _ = roll_call.call(folder.logs)
    if absent:
        node = absent[0].partition(":")[0] if len(absent) == 1 else None
        nodes = os.environ["TREBUCHET_NODES"].split(",")
        raise JobFailed(
            f"this allocation is not fit to train: {'; '.join(absent)}",
            node if node in nodes and len(nodes) > 1 else None,
        )


def check_allocation(runtime: Runtime, plan: Plan) -> None:
    """All ranks together, before a model is loaded. Raises JobFailed with every fault, and the node when it is one node's."""
    from ..training import allocation, load
    from .api import disk_bytes

    folder = runtime.folder
    there = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    report = allocation.examine(
        folder.root,
        runtime.device,
        needed_bytes=max(0, disk_bytes(plan) - there),
        model=lambda: load.model_folder(plan.config.model, plan.model),
    )
    if runtime.main:
        record.update(folder, allocation={key: report[key] for key in ("problems", "all_reduce_gbps", "seconds")})
    if report["problems"]:
        nodes = {one["node"] for one in report["ranks"]}
        named = {problem.partition(":")[0].partition(" ")[0] for problem in report["problems"]} & nodes
        faulty = named.pop() if len(named) == 1 and len(nodes) > 1 else None
        raise JobFailed(f"this allocation is not fit to train: {'; '.join(report['problems'])}.", faulty)


def describe(problem: BaseException) -> str:
    """One paragraph for failures that have a known way out, else the exception in a line."""
    text = str(problem).strip().splitlines()[0] if str(problem).strip() else ""
    if "out of memory" in text.lower() or "can't allocate memory" in text or isinstance(problem, MemoryError):
        return f"out of memory: {text}. Lower optimization.micro_batch or data.max_length, or choose lora or qlora."
    if (isinstance(problem, OSError) and problem.errno == errno.ENOSPC) or "No space left on device" in text:
        where = getattr(problem, "filename", None) or "the run folder"
        return f"no space left on the device that holds {where}; free some and `trebuchet resume`."
    if "does not support an attention implementation" in text:
        return f"{text.partition(' yet.')[0]}. Set model.attention to eager."
    if "Connection reset by peer" in text or "Connection closed by peer" in text:
        return "another rank ended in the middle of a step, and this one waited for it; its log has the cause, if it had time to say."
    return f"{type(problem).__name__}: {text.rstrip('.')}."


def make_room(folder: RunFolder) -> None:
    """What a failed attempt has no use for, given up first: on a full disk not even the reason could be written."""
    for path in folder.checkpoints.glob(".step-*.writing"):
        shutil.rmtree(path, ignore_errors=True)
    folder.reserve.unlink(missing_ok=True)


def write_outcome(folder: RunFolder, outcome: dict[str, Any]) -> None:
    """Once: the first to come wins, so that the cause is kept and not its echo on other ranks."""
    if not folder.outcome.exists():
        record.write_atomically(folder.outcome, json.dumps(outcome))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as `a.b.c: value`, which every tracker takes."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            out |= flat(value, name + ".")
        else:
            out[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out


class _Tee:
    """stderr of one rank: into its log file, and on rank 0 to the screen as well."""

    def __init__(self, stream: Any, path: Path, *, silent: bool):
        self.stream, self.silent = stream, silent
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, text: str) -> int:
        self.file.write(text.replace("\r", "\n"))
        if not self.silent:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.file.flush()
        if not self.silent:
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4) or sys.argv[2:3] not in ([], ["--until"]):
        raise UserError("usage: python -m trebuchet.launcher.worker RUN [--until STEP]")
    sys.exit(main(sys.argv[1], int(sys.argv[3]) if len(sys.argv) == 4 else None))
