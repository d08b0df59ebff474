"""Imports go one way, and the core decides without I/O: read from the source, so that no import is missed.

errors, config, conninfo, events, options <- _core <- _io <- pool <- sync <- psycopg2, metrics; cli above all
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import asyncpool

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(asyncpool.__file__).parent

# A room may import from those before it, and from itself; of the first each stands alone.
FLOORS = (
    {"histogram", "config", "conninfo", "options"},
    {"events"},
    {"errors"},
    {"_core"},
    {"_io"},
    {"pool"},
    {"sync"},
    {"psycopg2", "metrics"},
    {""},  # __init__: the public names
    {"cli"},
    {"__main__"},
)

# What decides has no clock, no chance, no I/O, no log.
FORBIDDEN_IN_CORE = {"asyncio", "threading", "time", "random", "socket", "logging", "anyio", "psycopg", "select", "os"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str  # absolute
    in_function: bool
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(source: str, path: Path) -> Iterator[Import]:
    """Every import of a file, at whatever depth."""
    parts = ("asyncpool", *path.with_suffix("").parts)
    package = parts[:-1]

    def visit(node: ast.AST, in_function: bool, for_types_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for module in modules_of(child, package):
                assert isinstance(child, (ast.Import, ast.ImportFrom))
                yield Import(path.as_posix(), child.lineno, module, in_function, for_types_only)
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, in_function or is_function, for_types_only or is_for_types)

    yield from visit(ast.parse(source), False, False)


def modules_of(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
    module = ".".join(filter(None, (base, node.module)))
    # `from . import x` names the module in its alias.
    return [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]


def all_imports() -> list[Import]:
    return [
        found for path in files() for found in imports_of(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE))
    ]


def room_of_file(file: str) -> str:
    return file.split("/", maxsplit=1)[0].removesuffix(".py").replace("__init__", "")


def room_of_module(module: str) -> str | None:
    """The room inside the package; None for anything outside of it."""
    first, _, rest = module.partition(".")
    return rest.split(".")[0] if first == "asyncpool" else None


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def is_allowed(importer: str, imported: str) -> bool:
    return imported == importer or floor_of(imported) < floor_of(importer)


def test_every_file_has_its_place_in_the_order() -> None:
    known = set().union(*FLOORS)
    assert {room_of_file(path.relative_to(PACKAGE).as_posix()) for path in files()} <= known


def test_imports_go_one_way() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if (room := room_of_module(found.module)) is not None and not is_allowed(room_of_file(found.file), room)
    ]
    assert wrong == []


def test_the_core_imports_nothing_that_does_io_or_tells_the_time() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if found.file.startswith("_core/") and found.module.split(".")[0] in FORBIDDEN_IN_CORE
    ]
    assert wrong == []


def test_no_import_hides_in_a_function_outside_the_cli() -> None:
    """There it would dodge a cycle; the cli does so for what is an optional extra."""
    wrong = [str(found) for found in all_imports() if found.in_function and not found.file.startswith("cli/")]
    assert wrong == []


def test_the_metrics_know_of_the_pools_only_what_users_know() -> None:
    allowed = {"asyncpool.events", "asyncpool.histogram", "asyncpool.pool", "asyncpool.sync"}
    inside = {
        found.module
        for found in all_imports()
        if found.file.startswith("metrics/") and room_of_module(found.module) is not None
    }
    assert inside <= allowed


def test_nothing_is_imported_at_run_time_but_the_declared_dependencies() -> None:
    """The metrics, which users import by name, may import what their extra brings."""
    extras = {"metrics/opentelemetry.py": {"opentelemetry"}, "metrics/prometheus.py": {"prometheus_client"}}
    allowed = set(sys.stdlib_module_names) | {"asyncpool", "psycopg", "anyio"}
    outside = {
        found.module.split(".")[0]
        for found in all_imports()
        if not found.file.startswith("cli/")
        and not found.for_types_only
        and found.module.split(".")[0] not in extras.get(found.file, set())
    }
    assert outside <= allowed


@pytest.mark.parametrize(
    ("file", "source", "module"),
    [
        ("pool.py", "import asyncio.events", "asyncio.events"),
        ("pool.py", "from ._core.machine import Slot", "asyncpool._core.machine"),
        ("_io/runner.py", "from ..pool import Pool", "asyncpool.pool"),
        ("_core/machine.py", "from .. import pool", "asyncpool.pool"),
        ("_core/__init__.py", "from .machine import Slot", "asyncpool._core.machine"),
        ("_core/machine.py", "def f():\n    if f:\n        import time", "time"),
        ("_core/machine.py", "class C:\n    async def f(self):\n        from asyncpool import cli", "asyncpool"),
        ("_core/machine.py", "if TYPE_CHECKING:\n    from .._io import runner", "asyncpool._io"),
    ],
)
def test_the_reader_of_imports_finds_them_all(file: str, source: str, module: str) -> None:
    [found] = imports_of(source, Path(file))
    assert found.module == module
    assert found.in_function == ("def " in source)
    assert found.for_types_only == ("TYPE_CHECKING" in source)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("_core", "_io"), ("_core", "pool"), ("_core", ""), ("_io", "pool"), ("config", "errors"), ("pool", "cli")],
)
def test_the_order_forbids_the_way_back(importer: str, imported: str) -> None:
    assert not is_allowed(importer, imported)
