"""Site settings: what is refused, and how it is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trebuchet.cluster_configs import __file__ as configs
from trebuchet.launcher.errors import ClusterError
from trebuchet.slurm.site import Site, build_site


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partitions": "gpu"}, ["slurm.partitions: unknown key", "did you mean 'partition'"]),
        ({"mail-type": "END"}, ["write it as extra: [--mail-type=…]"]),
        ({"extra": ["--partiton=gpu"]}, ["sbatch has no option --partiton", "did you mean 'partition'"]),
        ({"extra": ["--nodes=4"]}, ["--nodes is decided by the plan"]),
        ({"extra": ["--gpus-per-task=1"]}, ["--gpus-per-task is decided by the plan", "takes the one of its local rank"]),
        ({"srun": ["--het-group=0"]}, ["--het-group is decided by the plan", "nodes of one kind"]),
        ({"extra": ["-N4"]}, ["is not a long option"]),
        ({"srun": ["--exat"]}, ["srun has no option --exat", "did you mean 'exact'"]),
        ({"time": 86400}, ['"24:00:00"']),
        ({"time": "a day"}, ["is not a time of sbatch"]),
        ({"environment": {"HF_TOKEN": "hf_x"}}, ["looks like a secret", "secrets: {HF_TOKEN: ~/FILE}"]),
        ({"environment": {"A-B": "1"}}, ["is not a name of an environment variable"]),
        ({"account": "a\nb"}, ["control character"]),
        ({"container": {"image": "x", "mount": []}}, ["slurm.container.mount: unknown key", "did you mean 'mounts'"]),
        ({"warning_s": 5}, ["greater than or equal to 10"]),
    ],
)  # fmt: skip
def test_refused_in_a_sentence(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ClusterError) as refused:
        build_site(settings, "site.yaml")
    assert all(word in str(refused.value) for word in ["site.yaml: ", *words])
    assert "hf_x" not in str(refused.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ClusterError, match="2 problems") as refused:
        build_site({"partitions": "gpu", "extra": ["--nods=3"]}, "site.yaml")
    assert "partitions" in str(refused.value) and "--nods" in str(refused.value)


def test_template_with_every_line_switched_on() -> None:
    """What the template shows commented out is what the schema takes, and it shows every key."""
    text = (Path(configs).parent / "slurm-template.yaml").read_text(encoding="utf-8")
    block = text[text.index("\nslurm:") :]
    tree = yaml.safe_load(re.sub(r"(?m)^  # (?=[a-z_]+:)", "  ", block))
    build_site(tree["slurm"], "slurm-template.yaml")
    assert set(tree["slurm"]) == set(Site.model_fields)
