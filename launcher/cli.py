"""The command line. Each verb is a function that imports what it needs when it is called; `--help` imports nothing of ours.

Exit codes: 0 done, 1 the job failed, 2 the user's input is wrong, 3 nothing fits, 4 the scheduler refused, 130 stopped by the
user. Errors are one paragraph on stderr; a traceback only with --debug.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from .cli_cluster import add_cluster
from .cli_data import add_convert, add_data

EPILOG = """A run needs two lines of YAML:
    model: Qwen/Qwen2.5-0.5B-Instruct
    data: train.jsonl
"""


_SET: dict[str, Any] = {"action": "append", "default": [], "metavar": "a.b=c", "dest": "overrides"}


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from .errors import NothingFits, TrebuchetError

    try:
        return int(options.verb(options) or 0)
    except TrebuchetError as error:
        if options.debug:
            raise
        if isinstance(error, NothingFits) and getattr(options, "json", False):
            print_json(error.plan.public())
        print(f"trebuchet: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if options.debug:
            raise
        return 130
    except BrokenPipeError:  # `trebuchet plan … | head`
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="trebuchet",
        description=(__import__(__package__.partition(".")[0]).__doc__ or "").partition("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, function: Any, text: str, *, config: bool = False, json: bool = False, under: Any = verbs,
        cluster: bool = False, dry: str | None = None,
    ) -> argparse.ArgumentParser:  # fmt: skip
        sub: argparse.ArgumentParser = under.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(verb=function)
        if config:
            sub.add_argument("config", metavar="CONFIG", help="the YAML of the run")
            sub.add_argument("--set", **_SET, help="change one key; may be repeated")
            sub.add_argument(
                "--skip-bad-rows",
                action="append_const",
                const="data.skip_bad_rows=true",
                dest="overrides",
                help="leave out rows that cannot be read and list them in run.json, instead of refusing",
            )
        if cluster:
            sub.add_argument("--cluster", metavar="NAME|FILE", help="a name in cluster_configs/ or a cluster YAML")
        if dry:
            sub.add_argument("--dry-run", "--dryrun", action="store_true", help=f"print {dry}; start nothing")
        if json:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    from .cli_plan import add_estimate, plan_verb

    plan = verb(
        "plan",
        plan_verb,
        "decide how to train and explain it; nothing is started",
        config=True,
        json=True,
        cluster=True,
    )
    plan.add_argument("--probe", action="store_true", help="one step on fake tensors beside the formula; no GPU")
    verb("run", _run, "train on this machine, through accelerate", config=True, dry="the plan and the command")
    text = "hand the run to the cluster's scheduler and return"
    verb("submit", _submit, text, config=True, json=True, cluster=True, dry="the plan and what would be submitted")
    text = "start many runs that differ in some keys; `sweep:` of the YAML says which"
    sweep = verb("sweep", _sweep, text, config=True, cluster=True, dry="the trials and what would be submitted")
    sweep.add_argument(
        "-f", "--follow", action="store_true", help="show the table until the end; Ctrl+C cancels the sweep"
    )
    resume = verb("resume", _resume, "go on with a run from its newest checkpoint, or with what is left of a sweep")
    resume.add_argument("run", metavar="RUN")
    text = "go on with other ranks or in another layout: cluster.processes, strategy.parallel, …"
    resume.add_argument("--set", **_SET, help=text)
    resume.add_argument(
        "--verify",
        action="store_true",
        help="only replay steps from the last checkpoint and compare with the recorded losses",
    )
    resume.add_argument("--steps", type=int, default=5, metavar="N", help="with --verify: how many steps (5)")
    status = verb("status", _status, "state, step and attempts of a run; the table of a sweep", json=True)
    status.add_argument("run", metavar="RUN")
    status.add_argument("-f", "--follow", action="store_true", help="of a sweep: draw the table again until it ends")
    logs = verb("logs", _logs, "what the ranks of a run wrote, rank by rank; -f follows until it ends")
    logs.add_argument("run", metavar="RUN")
    logs.add_argument("-f", "--follow", action="store_true")
    cancel = verb("cancel", _cancel, "ask a run, or all trials of a sweep, to save a checkpoint and stop")
    cancel.add_argument("run", metavar="RUN")
    from .after import add_verbs

    add_verbs(verb)
    add_estimate(verb)
    doctor = verb("doctor", _doctor, "is this machine, or an allocation of a cluster, fit to train", json=True)
    doctor.add_argument("--cluster", metavar="NAME|FILE", help="ask the nodes of this cluster, in a job of a minute")
    data = verbs.add_parser("data", help="prepare the training data ahead of a run")
    add_data(partial(verb, under=data.add_subparsers(required=True, metavar="VERB")))
    add_cluster(verb)
    add_convert(verb)
    verb("config-schema", _schema, "JSON schema of the YAML, for editors")
    return top


def _run(options: argparse.Namespace) -> int:
    from . import api, local
    from .plan_text import render
    from .run_folder import new_run

    if options.dry_run:
        plan = api.plan(options.config, overrides=options.overrides)
        print(render(plan), end="")
        if plan.feasible:
            print("\n" + local.render(local.job_spec(plan, new_run(plan.config.output))), end="")
        return 0 if plan.feasible else 3
    folder, plan = api.begin(options.config, overrides=options.overrides, here=True)
    print(render(plan), end="\n", flush=True)
    code = local.execute(folder, plan)
    _closing(folder, code)
    return code


def _submit(options: argparse.Namespace) -> int:
    from . import api, backends, record
    from .plan_text import render
    from .run_folder import RunFolder, new_run

    if options.dry_run:
        plan = api.plan(options.config, cluster=options.cluster, overrides=options.overrides)
        print(render(plan), end="")
        if not plan.feasible:
            return 3
        api.refuse_what_cannot_start(plan)
        print("\n" + backends.of_plan(plan).preview(plan, new_run(plan.config.output)), end="")
        return 0
    handle = api.submit(options.config, cluster=options.cluster, overrides=options.overrides)
    if options.json:
        print_json(handle.model_dump(mode="json"))
    else:
        print(f"{handle.run} is {handle.handle}; follow it with `trebuchet logs -f {handle.folder}`")
        if record.read(RunFolder(handle.folder))["data"] is None:
            print("torch and transformers are not installed here, so the data are checked in the job's first minute")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from . import sweep_verbs

    return sweep_verbs.start(options)


def _resume(options: argparse.Namespace) -> int:
    from . import api, backends, local, sweep_verbs

    if several := sweep_verbs.open_sweep(options.run):
        return sweep_verbs.resume(several, options.overrides, verify=options.verify)
    if options.verify:
        verdict = api.verify(options.run, steps=options.steps)
        print(verdict.text())
        return 0 if verdict.holds else 1
    folder, plan = api.resumable(options.run, options.overrides)
    if plan.cluster.scheduler != "local":
        handle = backends.of_plan(plan).submit(folder, plan)
        print(f"{handle.run} is {handle.handle}; follow it with `trebuchet logs -f {handle.folder}`")
        return 0
    code = local.execute(folder, plan)
    _closing(folder, code)
    return code


def _closing(folder: Any, code: int) -> None:
    """The last lines of a run: what came of it and where things are."""
    from . import record
    from .run_text import outcome

    print(outcome(folder, record.read(folder)), file=sys.stderr if code else sys.stdout)


def _status(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from . import api, record, sweep_verbs
    from .errors import UserError
    from .run_folder import open_run
    from .run_text import measured, status

    if several := sweep_verbs.open_sweep(options.run):
        return sweep_verbs.status(several, json=options.json, follow=options.follow)
    if options.follow:
        raise UserError("status -f is for sweeps; follow a run with `trebuchet logs -f`.")
    folder = open_run(options.run)
    api.current_state(folder)
    found = record.read(folder)
    if options.json:
        shown = {key: found[key] for key in ("run", "state", "step", "steps", "attempts", "exit_code", "error")}
        real = measured(folder, found)
        print_json(shown | {"actual": None if real is None else asdict(real)})
    else:
        print(status(folder, found))
    return 0


def _logs(options: argparse.Namespace) -> int:
    from . import logs
    from .run_folder import open_run

    folder = open_run(options.run)
    for line in logs.lines(folder, follow=options.follow):
        print(line, flush=options.follow)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from . import api, sweep_verbs

    several = sweep_verbs.open_sweep(options.run)
    print(f"{options.run} {sweep_verbs.cancel(several) if several else api.cancel(options.run)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor, of_allocation, render

    if options.cluster:
        from . import backends
        from .cluster import load_cluster

        cluster = load_cluster(options.cluster)
        report = of_allocation(backends.backend(cluster.scheduler).examine(cluster))
    else:
        report = doctor()
    if options.json:
        print_json(report.to_json())
    else:
        print(render(report), end="")
    return report.exit_code


def _schema(options: argparse.Namespace) -> int:
    from .config import json_schema

    print_json(json_schema())
    return 0


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
