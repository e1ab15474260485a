"""The list of options against the installed Slurm's own."""

from __future__ import annotations

import re

import pytest
from trebuchet.slurm import options

from .cluster import SlurmCluster


@pytest.mark.slow
@pytest.mark.parametrize(("program", "known"), [("sbatch", options.SBATCH), ("srun", options.SRUN)])
def test_every_option_of_the_installed_slurm_is_known(slurm: SlurmCluster, program: str, known: frozenset[str]) -> None:
    named = set(re.findall(r"(?:^|[ ,])--([a-z][a-z0-9-]+)", slurm.ask(program, "--help")))
    assert len(named) > 80 and named <= known, named - known
