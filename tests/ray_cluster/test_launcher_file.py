"""Files of Ray's own launcher: known as such, resized in a copy, and one started, resized and ended by Ray's own commands."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher import cli
from trebuchet.launcher.cluster import CONFIGS
from trebuchet.launcher.errors import ClusterError
from trebuchet.ray_cluster import launcher_file
from trebuchet.ray_cluster.head import free_ports

from .test_runs import wait_for


def a_file(**changes: Any) -> dict[str, Any]:
    kinds = {
        "head": {"resources": {"CPU": 0}, "node_config": {}},
        "worker": {"resources": {"CPU": 1}, "node_config": {}},
    }
    kinds["worker"] |= {"min_workers": 0, "max_workers": 2}
    tree = {"cluster_name": "theirs", "provider": {"type": "aws", "region": "x"}, "available_node_types": kinds}
    return {**tree, "head_node_type": "head", "max_workers": 2, **changes}


def test_files_are_known_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(a_file()))
    assert launcher_file.read(str(tmp_path / "theirs.yaml")) == a_file()
    assert [path for path in CONFIGS.glob("*.yaml") if launcher_file.read(str(path)) is not None] == []
    (tmp_path / "broken.yaml").write_text("a: [")
    assert launcher_file.read(str(tmp_path / "broken.yaml")) is None and launcher_file.read("ray-local") is None


@given(st.integers(0, 1000), st.booleans())
def test_a_resized_copy_differs_in_three_numbers(nodes: int, at_most: bool) -> None:
    tree = a_file()
    found = launcher_file.resized(tree, nodes, at_most=at_most)
    assert tree == a_file()
    worker = found["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["max_workers"], found["max_workers"]) == (
        0 if at_most else nodes,
        nodes,
        nodes,
    )
    expected = copy.deepcopy(tree)
    expected["available_node_types"]["worker"], expected["max_workers"] = worker, nodes
    assert found == expected


def test_a_number_of_several_kinds_is_refused() -> None:
    tree = a_file()
    tree["available_node_types"]["other"] = {"resources": {}, "node_config": {}}
    with pytest.raises(ClusterError, match=r"2 kinds of workers \(worker, other\)"):
        launcher_file.resized(tree, 1, at_most=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_resize_and_down_by_ray_s_own_commands(
    ray_starts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its machines are folders of this one (here_provider.py): only SSH is replaced."""
    gcs, client, dashboard = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="tr-") as scratch:  # short: it holds sockets
        machines = Path(scratch) / "m"
        machines.mkdir()
        (tmp_path / "token").write_text("0" * 64)
        (tmp_path / "token").chmod(0o600)
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
            "AUTOSCALER_UPDATE_INTERVAL_S": "2",
        }
        environment |= {"PYTHONPATH": str(Path(__file__).parent)}
        ray = f"{sys.executable} -m ray.scripts.scripts start --object-store-memory=100000000 --disable-usage-stats"
        number = f'--resources="{{\\"NODE_ID_AS_RESOURCE\\": $HERE_MACHINE}}" --temp-dir={scratch}/r$HERE_MACHINE'
        provider = {
            "type": "external",
            "module": "here_provider.Here",
            "folder": str(machines),
            "environment": environment,
        }
        tree = a_file(
            provider=provider | {"use_node_id_as_ip": True},
            auth={},
            head_start_ray_commands=[
                f"{ray} --head --port={gcs} --ray-client-server-port={client} --num-cpus=0 {number} --include-dashboard=false "
                f"--dashboard-port={dashboard} --node-ip-address=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
            ],
            # What Ray fills in for a cloud and asks of an external provider's file.
            **{
                key: []
                for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
            },
            **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            file_mounts={},
            file_mounts_sync_continuously=False,
            docker={},
            upscaling_speed=1.0,
            idle_timeout_minutes=5,
            worker_start_ray_commands=[f"{ray} --address=127.0.0.1:{gcs} --num-cpus=1 {number}"],
        )
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(tree))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        file = str(tmp_path / "theirs.yaml")

        def status() -> dict[str, Any]:
            capsys.readouterr()
            assert cli.main(["cluster", "status", file, "--json"]) == 0
            found: dict[str, Any] = json.loads(capsys.readouterr().out)
            return found

        def logs() -> str:
            return "\n".join(path.read_text()[-2000:] for path in machines.glob("*/log"))

        try:
            assert cli.main(["cluster", "up", file]) == 0, logs()
            assert status()["up"] and status()["nodes"] == []
            assert cli.main(["cluster", "resize", file, "1"]) == 0
            wait_for(lambda: any("raylet" in p for p in running(machines / "2")), 120, logs)
            assert len(status()["nodes"]) == 1  # once: it is two commands of Ray's, of seconds each
        finally:
            assert cli.main(["cluster", "down", file]) == 0, logs()
        assert not status()["up"]
        assert not running(machines / "1") and not running(machines / "2")


def running(machine: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(machine) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except psutil.Error:
            continue
    return found
