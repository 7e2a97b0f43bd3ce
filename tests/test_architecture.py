"""The shape of the code base: sizes, imports, floors, knobs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenloom.config import knobs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tokenloom"
SOURCES = sorted(path for folder in (PACKAGE, ROOT / "tools") for path in folder.rglob("*.py"))
PACKAGE_SOURCES = [path for path in SOURCES if path.is_relative_to(PACKAGE)]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_KNOBS = 60
FORBIDDEN = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "torch", "transformers"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE_SOURCES}


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything imported anywhere in a file, also inside functions.

    Imports under TYPE_CHECKING do not run and are left out.
    """
    tree = parse(path)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Module → modules of the package that it imports; names inside a module count as that module."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        graph[name] = {target for target in imported(path) if target in MODULES and target != name}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle as a list of modules, or an empty list."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        trail.append(node)
        for target in sorted(graph[node]):
            if state.get(target) == 1:
                return [*trail[trail.index(target) :], target]
            if target not in state and (found := visit(target)):
                return found
        trail.pop()
        state[node] = 2
        return []

    for node in sorted(graph):
        if node not in state and (found := visit(node)):
            return found
    return []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_no_import_cycles_counting_lazy_imports() -> None:
    graph = import_graph()
    # The root module offers names of upper floors lazily. Nobody below may import through it.
    offered = graph.pop("tokenloom")
    assert offered <= {
        "tokenloom.serving",
        "tokenloom.serving.llm",
        "tokenloom.engine",
        "tokenloom.engine.sampling_params",
    }
    for targets in graph.values():
        targets.discard("tokenloom")
    assert find_cycle(graph) == []


def test_the_cycle_finder_finds_cycles() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_only_faces_import_the_root_module() -> None:
    for name, path in MODULES.items():
        floor = name.split(".")[1] if "." in name else ""
        for target in imported(path):
            if target in ("tokenloom.LLM", "tokenloom.SamplingParams"):
                pytest.fail(f"{name} imports {target} through the root")
            if target == "tokenloom.__version__":
                assert floor in {"cli", "api", "serving"}, f"{name} imports the root"


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_forbidden_imports(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path)} & FORBIDDEN
    assert not found, f"imports {sorted(found)}"


@pytest.mark.parametrize("module", ["tokenloom.cli.main", "tokenloom.api.app", "tokenloom.serving.llm"])
def test_faces_load_no_torch(module: str) -> None:
    if module not in MODULES:
        pytest.skip(f"{module} does not exist yet")
    program = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["api", "cli"])
def test_outside_input_is_never_checked_with_assert(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        for node in ast.walk(parse(path)):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"


def test_only_the_configuration_reads_the_environment() -> None:
    for name, path in MODULES.items():
        if name == "tokenloom.config":
            continue
        text = path.read_text()
        assert "os.environ.get" not in text, name
        assert "os.getenv" not in text, name


def test_knobs_are_few_and_explained() -> None:
    entries = list(knobs())
    assert 0 < len(entries) <= MAX_KNOBS
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert len(entry.help) >= 10, entry.name
        assert entry.help.endswith("."), entry.name


def test_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"install", "serve", "test", "lint", "bench"} <= targets
    used = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / "README.md").read_text()))
    assert used <= targets
    assert {"serve", "test"} <= used
