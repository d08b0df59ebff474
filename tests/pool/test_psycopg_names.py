"""The private names of psycopg that the package mentions, found in its source: each wants a test of what it means."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

import asyncpool

if TYPE_CHECKING:
    from collections.abc import Iterator

# Every private name of psycopg that the package mentions. A new one wants a test in test_psycopg_contract.py,
# test_psycopg_client_state.py or test_psycopg_queries.py; those that may ask the server nothing are in
# tests/sync/test_health.py; what `_io/libpq.py` does with `_pq_ctypes` is tested in tests/test_libpq.py.
TESTED = {
    "_WaitTimeout",
    "_adapters",
    "_autocommit",
    "_begin_statement",
    "_commit_gen",
    "_connection_base",
    "_counts",
    "_deferrable",
    "_dumpers",
    "_dumpers_by_oid",
    "_encoding",
    "_enter_gen",
    "_exec_command",
    "_exit_gen",
    "_isolation_level",
    "_loaders",
    "_names",
    "_notice_handler",
    "_notice_handlers",
    "_notifies_backlog",
    "_notify_handler",
    "_notify_handlers",
    "_num_transactions",
    "_pipeline",
    "_pipeline_base",
    "_pool",
    "_pq_ctypes",
    "_prepared",
    "_prepared_idx",
    "_preparing",
    "_queries",
    "_query_cls",
    "_read_only",
    "_registry",
    "_rollback_gen",
    "_rotate",
    "_rowcount",
    "_set_autocommit_gen",
    "_set_deferrable_gen",
    "_set_isolation_level_gen",
    "_set_read_only_gen",
    "_statusmessage",
    "_to_flush",
    "_tpc",
    "_try_cancel",
}


# Also a method of psycopg2's pools, which the drop-in looks for.
NOT_MEANT = {"_connect"}


def private_names_of_psycopg() -> set[str]:
    """Those that its modules define or assign, as far as the pool could mean them."""
    names: set[str] = set()
    package = Path(psycopg.__file__).parent
    for path in package.rglob("*.py"):
        names.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            if isinstance(node, ast.ClassDef):
                names.update(names_assigned_in(node))
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def names_assigned_in(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def private_names_mentioned() -> set[str]:
    """Those in attributes, in strings that are nothing but dotted names, and in imports from psycopg."""
    mentioned: set[str] = set()
    for path in Path(asyncpool.__file__).parent.rglob("*.py"):
        for node in walk_past_slots(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                mentioned.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                mentioned.update(node.value.split("."))
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("psycopg"):
                mentioned.update(node.module.split("."), (alias.name for alias in node.names))
    return {name for name in mentioned if name.startswith("_") and not name.startswith("__")}


def walk_past_slots(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        slots = isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__slots__"
        if not slots:
            yield child
            yield from walk_past_slots(child)


def test_every_private_name_of_psycopg_that_the_package_mentions_has_a_test() -> None:
    assert private_names_mentioned() & private_names_of_psycopg() - NOT_MEANT <= TESTED
