"""Files of Ray's own launcher: known as such, resized in a copy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trebuchet.launcher.cluster import CONFIGS
from trebuchet.launcher.errors import ClusterError
from trebuchet.ray_cluster import launcher_file


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
