"""Imports point one way, and optional libraries are imported only where they are used; read from the source, nothing is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "quant_compile"
PACKAGE = "quant_compile"

# Each part may import itself and any part before it. The order is that of docs/architecture.md.
ORDER = (
    ("page",),
    ("ir",),
    ("lowering",),
    ("passes",),
    ("yaml_lines",),
    ("rules",),
    ("model",),
    ("simulate",),
    ("policy",),
    ("options",),
    ("checkpoints",),
    ("runtime",),
    ("backend",),
    ("generation",),
    ("rounded",),
    ("inspect", "calibrating", "sampled_text", "explain", "api", "exporting"),
    ("measure", "diff"),
    ("building", "gathering"),
    ("pretrained", "_transformers"),
    ("saving", "on_import"),
    ("",),
    ("cli_common",),
    ("cli_measure", "cli_diff", "cli_help"),
    ("cli", "demo"),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
LIBRARIES = {"sgl_kernel", "humming", "deep_gemm", "triton", "transformers", "torchao", "gguf", "matplotlib", "scipy"}


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        file: where it stands.
        line: its line.
        target: dotted name of the module it brings in.
        late: inside a function, or only for the type checker.
    """

    file: Path
    line: int
    target: str
    late: bool


def part_of(module: str) -> str:
    """``quant_compile.ir.scheme`` -> ``ir``; the package itself is the empty word."""
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path) -> str:
    """Dotted name of a source file."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_in(file: Path) -> Iterator[Import]:
    """Every import of a file; relative ones resolved."""
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), file, late=False)


def _walk(node: ast.AST, file: Path, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, late)
        elif isinstance(child, ast.ImportFrom):
            for target in _targets(child, file):
                yield Import(file, child.lineno, target, late)
        else:
            yield from _walk(child, file, late or _is_late(child))


def _targets(node: ast.ImportFrom, file: Path) -> list[str]:
    base = node.module or ""
    if node.level:
        package = module_of(file).split(".") if file.stem == "__init__" else module_of(file).split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    # ``from quant_compile.model import names as naming`` brings a module, not a name of the package.
    folder = ROOT.parent.joinpath(*base.split("."))
    modules = [
        alias.name for alias in node.names if (folder / f"{alias.name}.py").is_file() or (folder / alias.name).is_dir()
    ]
    return [f"{base}.{name}" for name in modules] if len(modules) == len(node.names) else [base]


def _is_late(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return True
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


FILES = sorted(ROOT.rglob("*.py"))
ALL = [found for file in FILES for found in imports_in(file)]
OWN = [found for found in ALL if found.target == PACKAGE or found.target.startswith(f"{PACKAGE}.")]


def circles(imports: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Strongly connected modules of a graph (module, module that it imports): groups in which each needs each other's."""
    graph: dict[str, set[str]] = {}
    for here, there in imports:
        graph.setdefault(here, set()).add(there)
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, waiting = set[str](), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting.extend(new)
        reached[start] = found
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached.get(other, ())))
        for module in graph
        if module in reached[module]
    }
    return sorted(groups)


def way_through(circle: Sequence[str], imports: Iterable[tuple[str, str]]) -> str:
    """The shortest way through a circle and back to its first module, for people."""
    graph = {here: sorted(there for at, there in imports if at == here and there in circle) for here in circle}
    ways = [(circle[0],)]
    while ways:
        way = ways.pop(0)
        for there in graph[way[-1]]:
            if there == circle[0]:
                return " -> ".join((*way, there))
            if there not in way:
                ways.append((*way, there))
    raise ValueError(f"{circle} is no circle")


def wrong_way(found: Import) -> bool:
    """Whether an import points from a part to one that comes after it."""
    return RANK[part_of(found.target)] > RANK[part_of(module_of(found.file))]


def test_every_part_has_its_place() -> None:
    parts = {part_of(module_of(file)) for file in FILES}
    assert parts <= set(RANK), f"give {parts - set(RANK)} a place in ORDER"
    assert {part_of(found.target) for found in OWN} <= set(RANK)


def test_imports_point_one_way() -> None:
    """Late imports too, except the one that is stated below."""
    wrong = {f"{module_of(i.file)}:{i.line} imports {i.target}" for i in OWN if wrong_way(i)}
    assert not wrong


def module_graph() -> list[tuple[str, str]]:
    """(module, module that it imports), late imports and those for the type checker included; names without the package's."""
    modules = {module_of(file) for file in FILES}

    def own(module: str) -> str:
        while module not in modules:  # a name of a module, not a module
            module = module.rpartition(".")[0]
        return module

    pairs = {(module_of(found.file), own(found.target)) for found in OWN}
    return sorted((here.removeprefix(f"{PACKAGE}."), there.removeprefix(f"{PACKAGE}.")) for here, there in pairs)


def test_no_two_modules_need_each_other() -> None:
    """No circle of imports, at the top or late: every module can be read, and moved, after those that it imports."""
    graph = module_graph()
    found = [way_through(circle, graph) for circle in circles(graph)]
    assert not found, "circles of imports: " + "; ".join(found)


def test_a_circle_is_found() -> None:
    """Of two, of three, and of one with itself; named by its way. What only hangs on a circle is no part of it."""
    graph = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "e"), ("e", "f"), ("f", "d"), ("f", "g"), ("h", "h")]
    assert circles(graph) == [("b", "c"), ("d", "e", "f"), ("h",)]
    ways = [way_through(circle, graph) for circle in circles(graph)]
    assert ways == ["b -> c -> b", "d -> e -> f -> d", "h -> h"]
    assert circles([("a", "b"), ("a", "c"), ("b", "c")]) == []
    known = {module for pair in module_graph() for module in pair}
    assert {"ir.family", "ir.scheme", "lowering.kernels.experts.triton_moe"} <= known


def test_inside_a_folder_nothing_imports_its_users() -> None:
    """Kernels and schemes are found by the registry; the registry, selection and weights name none of them."""
    for found in OWN:
        here, there = module_of(found.file), found.target
        if here.startswith("quant_compile.ir."):
            assert there.startswith(("quant_compile.ir", "quant_compile.page")), f"{here}:{found.line}"
        if there.startswith("quant_compile.lowering.kernels."):
            allowed = ("quant_compile.lowering.kernels.",)
            assert here.startswith(allowed), f"{here}:{found.line} names the kernel {there}"
        if there.startswith("quant_compile.lowering.schemes."):
            allowed = ("quant_compile.lowering.schemes.", "quant_compile.lowering.kernels.")
            assert here.startswith(allowed), f"{here}:{found.line} names the scheme {there}"


def test_passes_do_not_know_each_other_beyond_shared_helpers() -> None:
    """One pass may be taken out: only helper functions are shared, never a pass."""
    passes = {file.stem for file in (ROOT / "passes").glob("*.py")} - {"__init__", "plan"}
    for file in (ROOT / "passes").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and file.stem in passes:
                assert not {alias.name for alias in node.names} & passes, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_optional_libraries_are_imported_late(library: str) -> None:
    """Importing the package must work without them; files with a leading underscore are imported late themselves.

    Such files may import each other at the top: each is held to the same.
    """
    early = {found.file for found in ALL if found.target.split(".")[0] == library and not found.late}
    for found in ALL:
        if found.target.split(".")[0] == library and not found.late:
            assert found.file.stem.startswith("_") and found.file.stem != "__init__", f"{found.file}:{found.line}"
            users = [i for i in OWN if i.target == module_of(found.file)]
            assert all(user.late or user.file in early for user in users), (
                f"{found.file} is imported at the top of a module"
            )


def test_torch_is_asked_about_the_device_in_one_place() -> None:
    """``lowering/target.py`` is the only one that asks which GPU there is; ``tune.py``, which measures it, asks for its L2."""
    asking = {"get_device_properties", "get_device_capability", "get_device_name"}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in asking:
                assert file.name in ("target.py", "tune.py"), f"{file}:{node.lineno} asks for {node.attr}"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    """An import against the order is seen in each way to write it."""
    file = ROOT / "ir" / "scheme.py"
    for text in (
        "from quant_compile.lowering.select import choose",
        "import quant_compile.backend",
        "from quant_compile import runtime",
        "def f():\n    from quant_compile.passes import lower",
        "from ..passes import plan",
    ):
        tree = ast.parse(text)
        assert all(wrong_way(found) for found in _walk(tree, file, late=False)), text
        assert list(_walk(tree, file, late=False))


def test_what_the_package_offers_is_imported_at_its_first_use() -> None:
    """No module takes the place of a function of its name; and the ops of saved programs are there from the start."""
    script = """
import pkgutil, sys, types
import torch
import quant_compile
late = {"quant_compile.pretrained", "quant_compile.measure", "quant_compile.generation", "transformers"} & set(sys.modules)
assert not late, late
assert hasattr(torch.ops.sglq, "linear") and torch.ops.sglq.linear.default
from quant_compile import *
first = {name: getattr(quant_compile, name) for name in quant_compile.__all__}
for found in pkgutil.walk_packages(quant_compile.__path__, "quant_compile."):
    if not any(part.startswith("_") for part in found.name.split(".")[1:]):
        try:
            __import__(found.name)
        except ImportError:
            pass  # a library that is not here
assert not [name for name, value in first.items() if isinstance(value, types.ModuleType)]
assert not [name for name, value in first.items() if getattr(quant_compile, name) is not value]
assert set(quant_compile.__all__) <= set(dir(quant_compile))
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
quant_compile.compile(model, policy="W8A16")
assert "torch._dynamo.repro.after_dynamo" not in sys.modules, "torch.compile was asked before the first call"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
