"""`trebuchet push`: a model of a run into a registry, by the registry's own library, and only when it is asked for by this verb.

    hub       a private repository on the Hugging Face Hub, one commit             huggingface_hub
    wandb     an artifact of type model, linked into the model registry            wandb
    mlflow    artifacts of an MLflow run, and a version of a registered model      mlflow-skinny or mlflow

Each library finds address and token where its users keep them (HF_TOKEN or `hf auth login`, WANDB_API_KEY or ~/.netrc,
MLFLOW_TRACKING_URI); none is taken as an option, so none stands in a process title, a log or the record. What is pushed is what lies
in the run folder, with its card; where it came from goes along as tags. Left out: pulling, and deleting what was pushed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..launcher import record
from ..launcher.errors import JobFailed, RunError, UserError
from .card import public_name, write_card
from .finished import Finished

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
EXTRA = {"hub": "train", "wandb": "registries", "mlflow": "registries"}
Files = Mapping[str, Path]  # name in the registry -> file here


def push(
    run: Finished, to: str, name: str, *, origin: Mapping[str, Any], what: str, public: bool, dry_run: bool
) -> dict[str, Any]:
    """What stands in the record's `pushed` afterwards. `origin`: the run's lineage, as `show --lineage --json` prints it. `what`:
    model, merged, or an export by its name. Raises UserError for what cannot be pushed, JobFailed with the registry's own words."""
    folder = folder_of(run, what)
    with tempfile.TemporaryDirectory() as scratch:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if what == "model":  # merged and exported folders have their card already
            write_card(Path(scratch), run)
            files["README.md"] = Path(scratch) / "README.md"
        found: dict[str, Any] = {
            "to": to,
            "name": name,
            "what": what,
            "bytes": sum(path.stat().st_size for path in files.values()),
            "files": sorted(files),
        }
        if dry_run:
            return found
        sha256 = {n: _sha256(p) for n, p in files.items() if n.endswith((".safetensors", ".gguf"))}
        try:
            found |= SENDERS[to](name, files, tags(run, origin, what), public)
        except ImportError:
            raise UserError(f"--to {to} needs a package: `pip install 'trebuchet[{EXTRA[to]}]'`.") from None
        except UserError:
            raise
        except Exception as problem:
            raise JobFailed(f"{to} did not take {name}: {without_secrets(problem)}") from None
    found |= {"sha256": sha256, "at": record.now()}
    record.update(run.folder, pushed=[*(run.record.get("pushed") or []), found])
    return found


def folder_of(run: Finished, what: str) -> Path:
    known = {"model": run.folder.model, "merged": run.folder.merged}
    folder = known.get(what, run.folder.exports / what)
    if what in known or (Path(what).name == what and what not in (".", "..")):
        if folder.is_dir():
            return folder
        if what == "merged":
            raise RunError(f"{run.folder.root} has no merged model yet: trebuchet merge {run.folder.root}")
    there = [name for name, path in known.items() if path.is_dir()]
    there += sorted(path.name for path in run.folder.exports.glob("[!.]*") if path.is_dir())
    raise RunError(f"{run.folder.root} has no {what} to push; it has {', '.join(there)}.")


def tags(run: Finished, found: Mapping[str, Any], what: str) -> dict[str, str]:
    """Where it came from, in words that every registry takes."""
    evaluation = run.record.get("evaluation") or {}
    told = {
        "run": found["run"]["name"],
        "what": what,
        "method": found["method"],
        "objective": found["objective"],
        "base": public_name(found["base"]["name"]),
        "base_revision": found["base"]["revision"],
        "data_fingerprint": found["data"]["fingerprint"],
        "seed": found["seed"],
        "commit": (found["code"]["git"] or {}).get("commit"),
        "verdict": evaluation.get("verdict"),
        "held_out_loss": (evaluation.get("after") or {}).get("loss"),
    }
    return {key: str(value) for key, value in told.items() if value is not None}


def to_hub(name: str, files: Files, tags: Mapping[str, str], public: bool) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    repo = api.create_repo(name, private=not public, exist_ok=True)
    if not public and not api.model_info(repo.repo_id).private:  # it was there before
        raise UserError(f"{repo.repo_id} exists on the Hub and is public; --public says that you mean it.")
    added = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=path) for n, path in files.items()]
    lines = "\n".join(f"{key}: {value}" for key, value in tags.items())
    done = api.create_commit(
        repo.repo_id, added, commit_message=f"{tags['what']} of {tags['run']}", commit_description=lines
    )
    return {"version": done.oid, "url": str(repo)}


def to_wandb(name: str, files: Files, tags: Mapping[str, str], public: bool) -> dict[str, Any]:
    """Project and entity come from WANDB_PROJECT and WANDB_ENTITY. With WANDB_MODE=offline it lies in WANDB_DIR for `wandb sync`,
    and is not linked."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(job_type="push", name=tags["run"], config=dict(tags), settings=settings) as session:
        artifact = wandb.Artifact(name.rpartition("/")[2], type="model", metadata=dict(tags))
        for n, path in files.items():
            artifact.add_file(str(path), name=n)
        logged = session.log_artifact(artifact)
        offline = bool(session.offline)
        if offline:  # W&B 0.31 links only online
            return {"version": None, "url": session.settings.sync_dir, "linked": False}
        logged.wait()
        session.link_artifact(logged, name if "/" in name else f"wandb-registry-model/{name}")
        return {"version": logged.version, "url": session.url, "linked": True}


def to_mlflow(name: str, files: Files, tags: Mapping[str, str], public: bool) -> dict[str, Any]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trebuchet")
    there = client.get_experiment_by_name(experiment)
    run = client.create_run(
        there.experiment_id if there else client.create_experiment(experiment), run_name=tags["run"]
    )
    for key, value in tags.items():
        client.log_param(run.info.run_id, key, value)
    for n, path in files.items():
        client.log_artifact(run.info.run_id, str(path), str(Path("model") / Path(n).parent))
    client.set_terminated(run.info.run_id)
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/model"
    made = client.create_model_version(name, source, run_id=run.info.run_id, tags=dict(tags))
    return {"version": str(made.version), "url": source}


SENDERS: dict[str, Callable[[str, Files, Mapping[str, str], bool], dict[str, Any]]] = {
    "hub": to_hub,
    "wandb": to_wandb,
    "mlflow": to_mlflow,
}


def without_secrets(problem: BaseException) -> str:
    """First line of what a library said, with every token of the environment blotted out."""
    text = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
