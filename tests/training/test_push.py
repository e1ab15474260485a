"""`trebuchet push`: by the registries' own libraries. The Hub's is spoken to by a server here that keeps what it is sent, MLflow's
has a store in a folder, W&B's works offline; no service is reached."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from trebuchet.launcher import api, cli, record, worker
from trebuchet.launcher.run_folder import RunFolder

TOKEN = "hf_" + "secretsecret" * 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> RunFolder:
    changes = {"strategy.method": "lora", "strategy.lora": {"r": 4}, "optimization.max_steps": 2, "tracking": []}
    changes |= {"evaluation.forgetting": 0, "evaluation.generations": 0}
    folder, plan = api.begin(tiny_config(changes, output=str(tmp_path_factory.mktemp("runs") / "mine")))
    folder.logs.mkdir()
    assert worker.train(folder, plan)
    return folder


class Hub(BaseHTTPRequestHandler):
    """The endpoints of huggingface_hub's create_repo and create_commit, with every file taken inline."""

    kept: dict[str, Any]

    def do_GET(self) -> None:  # /api/models/me/tuned
        self.answer({"id": "me/tuned", "private": self.kept["private"], "tags": [], "downloads": 0, "likes": 0})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.kept["tokens"].add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": f"not known: {self.headers['Authorization']}"}, 401)
        if self.path == "/api/repos/create":
            self.kept["repo"] = json.loads(body)
            return self.answer({"url": f"http://{self.headers['Host']}/me/tuned"})
        if self.path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/commit/main"):
            self.kept["lines"] = [json.loads(line) for line in body.splitlines()]
            return self.answer(
                {
                    "success": True,
                    "commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/1",
                    "commitOid": "0123abcd",
                }
            )
        return self.answer({"errors": [], "warnings": []})  # /api/validate-yaml

    def answer(self, found: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    kept: dict[str, Any] = {"tokens": set(), "private": True}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Hub,), {"kept": kept}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kept
    server.shutdown()
    server.server_close()
    thread.join()


def push(run: RunFolder, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the libraries read their settings when they are imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "MLFLOW_"))}
    home = str(run.root.parent)
    command = [sys.executable, "-m", "trebuchet.launcher.cli", "push", str(run.root), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**kept, "HF_HOME": home, "HOME": home, **environment}
    )


def test_the_hub_gets_the_files_in_one_private_commit(run: RunFolder, hub: tuple[str, dict[str, Any]]) -> None:
    address, kept = hub
    done = push(run, "--to", "hub", "--name", "me/tuned", HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert kept["repo"]["name"] == "tuned" and kept["repo"]["organization"] == "me"
    assert kept["repo"]["visibility"] == "private"
    header, *sent = kept["lines"]
    assert header["value"]["summary"] == "model of mine" and "data_fingerprint: " in header["value"]["description"]
    files = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in sent}
    for file in run.model.iterdir():
        assert file.name == "README.md" or files.pop(file.name) == file.read_bytes(), file.name
    assert set(files) == {"README.md"} and b"held-out" in files["README.md"]
    found = record.read(run)["pushed"][-1]
    assert found["version"] == "0123abcd" and found["name"] == "me/tuned" and found["sha256"]
    assert "0123abcd" in done.stdout
    assert TOKEN not in run.record.read_text() + done.stdout + done.stderr and kept["tokens"] == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("case", ["token", "public"])
def test_a_wrong_token_and_a_public_repository_are_refused(
    run: RunFolder, hub: tuple[str, dict[str, Any]], case: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In this process, where the library was told at its import to stay offline."""
    from huggingface_hub import constants

    address, kept = hub
    kept["private"] = case != "public"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    secret = TOKEN[::-1] if case == "token" else TOKEN
    monkeypatch.setenv("HF_TOKEN", secret)
    was = record.read(run)
    assert cli.main(["push", str(run.root), "--to", "hub", "--name", "me/tuned"]) == (1 if case == "token" else 2)
    said = capsys.readouterr()
    assert ("hub did not take me/tuned" if case == "token" else "--public says") in said.err
    assert secret not in said.out + said.err and record.read(run) == was and "lines" not in kept


def test_a_dry_run_names_the_files_and_sends_nothing(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    was = run.record.read_text()
    assert cli.main(["push", str(run.root), "--to", "hub", "--name", "me/tuned", "--dry-run"]) == 0
    assert "adapter_model.safetensors" in capsys.readouterr().out and run.record.read_text() == was
    for what, says in (("merged", "trebuchet merge"), ("../mine", "has no ../mine"), ("hf", "it has model")):
        assert cli.main(["push", str(run.root), "--to", "hub", "--name", "x", "--what", what, "--dry-run"]) == 2
        assert says in capsys.readouterr().err


def test_mlflow_has_two_versions_of_a_model_with_their_lineage(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="the extra `registries` is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for version in ("1", "2"):
        assert cli.main(["push", str(run.root), "--to", "mlflow", "--name", "tuned", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["version"] == version
    stored = tmp_path / "store" / "models" / "tuned" / "version-2"
    facts = stored.joinpath("meta.yaml").read_text()
    assert (stored / "tags" / "data_fingerprint").read_text() == record.read(run)["data"]["fingerprint"]
    [kept] = {p for p in (tmp_path / "store").rglob("adapter_model.safetensors") if p.parent.as_uri() in facts}
    assert kept.read_bytes() == (run.model / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_wandb_keeps_an_artifact_to_be_synced(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra `registries` is not installed")
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path / "data")}
    settings |= {"WANDB_CACHE_DIR": str(tmp_path / "cache"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    done = push(run, "--to", "wandb", "--name", "tuned", "--json", **settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    [log] = Path(found["url"]).glob("*.wandb")
    text = log.read_bytes()
    assert not found["linked"] and b"adapter_model.safetensors" in text and b"data_fingerprint" in text
