"""The tree keeps its rules: import direction, no standard-library names, light imports, our own packages."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rl", "rewards", "rollouts")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_rewards_and_rollouts_import_nothing_of_ours_and_nobody_imports_the_rest() -> None:
    forbidden = {"rewards": {"rl", "rollouts"}, "rollouts": {"rl", "rewards"}, "rl": set()}
    for path in MODULES:
        package = path.relative_to(ROOT).parts[0]
        wrong = imported_packages(path) & (forbidden[package] | {"scripts", "tests", "configs"})
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module -> those of ours that it imports, inside functions and under TYPE_CHECKING, too."""
    ours = {module_name(path): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in ours.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{name} imports by dots"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {full if full in ours else node.module for full in whole}
        graph[name] = found & set(ours) - {name}
    return graph


def test_no_circle_of_imports() -> None:
    graph = import_graph()
    assert sum(map(len, graph.values())) > 500
    left = TopologicalSorter(graph)
    left.prepare()  # raises CycleError, which names the files


def room(module: str) -> str:
    parts = module.split(".")
    return "/".join(parts[:2]) if parts[0] == "rl" else parts[0]


def test_imports_go_down_the_list_of_the_docs() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Who may import whom")[1].split("\n## ")[0]
    floors = [line.strip().split(", ") for line in text.splitlines() if line.startswith("    ")]
    floor = {name: height for height, names in enumerate(floors) for name in names}
    assert set(floor) == {room(name) for name in import_graph()} - {"rl"}
    wrong = [
        f"{module} imports {other}"
        for module, others in import_graph().items()
        for other in others
        # The package itself names the Python interface, for type checkers.
        if room(module) != room(other)
        and "rl" not in (room(module), room(other))
        and floor[room(module)] <= floor[room(other)]
        and {room(module), room(other)} != {"rl/train", "rl/evaluation"}
    ]
    assert not wrong


def test_no_file_is_longer_than_400_lines() -> None:
    files = [*MODULES, *(ROOT / "scripts").glob("*.py")]
    assert not {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 400}


def test_no_module_has_a_standard_library_name() -> None:
    # A module called types.py or code.py breaks unrelated tools that are started from its folder.
    taken = [path for path in MODULES if path.stem in sys.stdlib_module_names]
    assert not taken


@pytest.mark.parametrize(
    "module",
    [
        "rl",
        "rl.config",
        "rewards",
        "rewards.run",
        "rollouts.samplers.options",
        "rollouts.engines.base",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_algorithm_section_of_a_config_imports_no_torch() -> None:
    code = (
        "import sys; from rl.registry import RECIPES, parse_recipe; "
        "[parse_recipe({'name': name}) for name in RECIPES.known]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "rl" / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_is_methods(path: Path) -> None:
    """No closure, partial or build(): what a recipe computes is a method that one can jump to."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = [node for f in functions for part in f.body for node in ast.walk(part)]
    assert not [node for node in inner if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    assert not [f.name for f in functions if f.name == "build"]
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "partial" not in names and "functools" not in imported_packages(path)


def test_the_three_packages_lie_side_by_side() -> None:
    import rewards
    import rl
    import rollouts

    homes = {Path(package.__file__ or "").resolve().parents[1] for package in (rl, rewards, rollouts)}
    assert len(homes) == 1


def test_a_foreign_package_of_our_name_is_named(tmp_path: Path) -> None:
    """`rewards` exists on PyPI: ours shadowed by it must give one sentence, not an ImportError from the depths."""
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    paths = [str(tmp_path), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; from rl.cli import main; sys.exit(main(['check']))"
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "another package named 'rewards' is installed at" in result.stderr
    assert result.stderr.count("\n") == 1
