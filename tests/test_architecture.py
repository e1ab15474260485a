"""What holds for the repository: who may import whom, what importing costs, that YAMLs load, that files stay short.

Imports are read with `ast`. One inside a function counts for direction but not for circles: it runs when it is called;
one inside `if TYPE_CHECKING:` never runs and counts for neither.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launcher", "strategies", "kernels", "training", "slurm", "ray_cluster", "cluster_configs")
SKIP = {"build", "dist", "runs"}
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "triton",
    "numpy",
    "submitit",
    "deepspeed",
)

# Files over 300 lines, each with its reason. 300 is where a file stops being read top to bottom.
LONG: dict[str, str] = {}


def modules() -> dict[str, Path]:
    """Dotted name below trebuchet -> file, of everything that is installed."""
    files = [ROOT / "__init__.py", *(f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py")))]
    names = {
        f: f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__").rstrip(".")
        for f in files
    }
    return {name: file for file, name in names.items()}


MODULES = modules()


@dataclass(frozen=True)
class Import:
    source: str
    target: str  # a module of ours, or a top-level name of another package
    when: str  # "load", "typing" or "call"
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target or 'trebuchet'} ({self.when})"


def imports_of(name: str) -> Iterator[Import]:
    file = MODULES[name]
    parts = [part for part in name.split(".") if part]  # none for the root
    inside = parts if file.name == "__init__.py" else parts[:-1]

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            below = when
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                below = "call"
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                below = "typing"
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, _ours(alias.name), when, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = inside[: len(inside) - child.level + 1] if child.level else []
                assert child.level <= len(inside) + 1, f"{file}: a relative import leaves the package"
                prefix = (
                    ".".join([*base, *([child.module] if child.module else [])])
                    if child.level
                    else _ours(child.module or "")
                )
                for alias in child.names:
                    deeper = f"{prefix}.{alias.name}".lstrip(".")
                    yield Import(name, deeper if deeper in MODULES else prefix, when, child.lineno)
            else:
                yield from visit(child, below)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), "load")


def _ours(dotted: str) -> str:
    return dotted.removeprefix("trebuchet.") if dotted.split(".")[0] == "trebuchet" else dotted.split(".")[0]


IMPORTS = [i for name in MODULES for i in imports_of(name)]
OURS = [i for i in IMPORTS if i.target in MODULES]


def package(name: str) -> str:
    return name.split(".")[0]


def reached(start: str, when: tuple[str, ...] = ("load",)) -> set[str]:
    """Every module of ours that importing `start` runs, itself included."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [i.target for i in OURS if i.source == name and i.when in when]
    return seen


def test_the_reader_of_imports_sees_what_there_is() -> None:
    """Guards the guards: known arrows of each kind are found."""
    found = {(i.source, i.target, i.when) for i in IMPORTS}
    assert ("strategies.memory", "strategies.memory_request", "load") in found
    assert ("training.step", "torch", "load") in found
    assert ("launcher.worker", "training.session", "call") in found
    assert ("training.runtime", "accelerate", "typing") in found


# Who may import whom, at load time and inside functions alike.
ALLOWED = {
    "kernels": {"kernels"},
    "strategies": {"strategies", "kernels"},
    "training": {"training", "strategies", "kernels", "launcher"},
    "slurm": {"slurm", "launcher", "ray_cluster"},  # nodes of a Ray cluster that are Slurm jobs
    "ray_cluster": {"ray_cluster", "launcher", "slurm"},
    "cluster_configs": set(),
    "launcher": {"launcher", "strategies", "training", "slurm", "ray_cluster"},
}
# Plain data and errors, which every part shares.
SHARED = {
    "launcher.errors",
    "launcher.plan",
    "launcher.schema",
    "launcher.schema_curate",
    "launcher.job",
    "launcher.job_state",
    "launcher.record",
    "launcher.run_folder",
    "launcher.model_families",
    "launcher.model_spec",
    "launcher.started",
    "launcher.stopping",
    "launcher.cluster",
    "launcher.inventory",
}
# The places that cross to the heavy side, all inside functions.
TO_TRAINING = {
    f"launcher.{name}"
    for name in ("worker", "api", "cli", "after", "evaluating", "verify", "data_verbs", "prefetch", "probing")
}


def breaking(rule: Callable[[str, str, str], bool]) -> list[str]:
    """Imports of ours, those for types apart, for which rule(source package, target package, target module) holds."""
    return [str(i) for i in OURS if i.when != "typing" and rule(package(i.source), package(i.target), i.target)]


def test_arrows_point_one_way() -> None:
    assert not breaking(lambda source, target, _: source in ALLOWED and target not in ALLOWED[source])


def test_only_shared_data_of_the_launcher_is_used_below_it() -> None:
    below = ("training", "strategies", "kernels")
    assert not breaking(
        lambda source, target, module: source in below and target == "launcher" and module not in SHARED
    )


def test_slurm_uses_shared_data_and_one_verb() -> None:
    """The job on the node keeps the same record as the launcher, and makes the checks that a bare login node could not."""
    known = {*SHARED, "launcher.api", "launcher.retry", "launcher.sweep_space", "launcher.sweep_budget"}
    assert not breaking(
        lambda source, target, module: source == "slurm" and target == "launcher" and module not in known
    )
    assert {i.source for i in OURS if package(i.source) == "slurm" and i.target == "launcher.api"} <= {"slurm.attempt"}


def test_the_launcher_reaches_training_only_where_a_run_begins() -> None:
    crossing = [
        i for i in OURS if package(i.source) == "launcher" and package(i.target) == "training" and i.when != "typing"
    ]
    assert crossing and {i.source for i in crossing} <= TO_TRAINING, [str(i) for i in crossing]
    assert all(i.when == "call" for i in crossing), [str(i) for i in crossing]


def test_the_planner_uses_the_torch_free_part_of_strategies() -> None:
    """Transitively, at load time, and without numpy too: it must start in a tenth of a second."""
    reach = reached("launcher.planner")
    heavy = [str(i) for i in IMPORTS if i.source in reach and i.when == "load" and package(i.target) in HEAVY]
    assert not heavy, "\n".join(heavy)


def test_no_circle_at_load_time() -> None:
    circles = [
        f"{i.source} <-> {i.target}"
        for i in OURS
        if i.when == "load" and i.source in reached(i.target) and i.source != i.target
    ]
    assert not circles, "\n".join(sorted(circles))


def loaded_by(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> set[str]:
    """Heavy packages in sys.modules after `code`, in a fresh interpreter."""
    show = f"\nimport sys; print('LOADED', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + show, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    names = ("trebuchet", *(f"trebuchet.launcher.{name}" for name in ("cli", "api", "local", "worker", "doctor")))
    assert loaded_by("import " + ", ".join(names)) == set()


def test_planning_loads_nothing_heavy(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("model: Qwen/Qwen2.5-0.5B-Instruct\ndata: train.jsonl\n")
    code = "import sys\nfrom trebuchet.launcher.cli import main\nassert main(['plan', sys.argv[1]]) == 0"
    assert loaded_by(code, str(config)) == set()


@pytest.mark.slow
def test_our_kernels_folder_does_not_shadow_the_kernels_package(tmp_path: Path) -> None:
    """transformers and bitsandbytes probe for Hugging Face's `kernels`: from the root they find that one, or none."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    import_all = "import transformers, bitsandbytes; from transformers import LlamaForCausalLM"
    assert "transformers" in loaded_by(import_all)
    stub = tmp_path / "site" / "kernels"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("MARK = 'the installed one'\n")
    assert loaded_by("import kernels; assert kernels.MARK == 'the installed one'", PYTHONPATH=str(stub.parent)) == set()


def files_ending(*suffixes: str) -> list[Path]:
    tops = [p for p in ROOT.iterdir() if p.name not in SKIP and (not p.name.startswith(".") or p.name == ".ci")]
    found = [f for top in tops for f in ([top] if top.is_file() else top.rglob("*"))]
    return sorted(f for f in found if f.suffix in suffixes and "__pycache__" not in f.parts)


def test_every_yaml_of_the_repository_loads() -> None:
    import yaml
    from trebuchet.launcher.cluster import load_cluster
    from trebuchet.launcher.config import load_config

    files = files_ending(".yaml", ".yml")
    assert len(files) >= 10
    for file in files:
        text = file.read_text(encoding="utf-8")
        kind = file.relative_to(ROOT).parts[0]
        if kind == "examples":
            load_config(file)
        elif kind == "cluster_configs":
            load_cluster(file.stem)
        else:
            assert list(yaml.safe_load_all(text)), file


def test_no_file_outgrows_a_reader() -> None:
    lines = {
        f.relative_to(ROOT).as_posix(): len(f.read_text(encoding="utf-8").splitlines()) for f in files_ending(".py")
    }
    over = {name: n for name, n in lines.items() if n > 300}
    assert set(over) <= set(LONG), f"over 300 lines and not in LONG with a reason: {sorted(set(over) - set(LONG))}"
    assert set(LONG) <= set(over), f"in LONG and no longer over 300 lines: {sorted(set(LONG) - set(over))}"


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for file in files_ending(".py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(file.relative_to(ROOT).as_posix())
    assert not silent, silent


def test_nothing_names_this_machine_or_leaves_work_undone() -> None:
    wrong = []
    for file in files_ending(".py", ".yaml", ".yml", ".md", ".toml", ".json"):
        if file == Path(__file__).resolve():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if any(word in line for word in (f"{ROOT}/", f"{Path.home()}/", "TODO", "FIXME", "NotImplementedError")):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)
