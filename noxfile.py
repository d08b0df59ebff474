"""What a change must pass. `nox` runs the sessions that are default; `nox -l` names all."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import nox

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "types", "examples", "tests"]
# One Python is enough: sessions for those that the machine lacks are skipped, wherever nox runs.
nox.options.error_on_missing_interpreters = False

BENCHMARKS = ["benchmarks/acquire.py", "benchmarks/query.py", "benchmarks/oneshot.py", "benchmarks/blocking.py"]
FUZZED = [
    "tests/faults/test_bad_input.py",
    "tests/faults/test_fuzzed_conninfo.py",
    "tests/faults/test_wrong_sequences.py",
]
CODE = ["asyncpool", "tests", "examples", "noxfile.py"]


def group(name: str) -> list[str]:
    """The requirements of a dependency group of pyproject.toml."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy --strict and pyright, on the package and the tests."""
    session.install(".[demo]", *group("test"), *group("examples"), *group("types"))
    session.run("mypy", "--strict", *CODE)
    # Else it asks the index whether there is a newer one.
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session
def examples(session: nox.Session) -> None:
    """Every example, as a user would run it."""
    session.install(".[demo]", *group("examples"))
    for example in sorted(Path("examples").glob("*.py")):
        session.run("python", "-W", "error", str(example))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Pytest, on a PostgreSQL of its own or that of DATABASE_URL."""
    session.install(".[demo]", *group("test"))
    # More processes than the least of machines has processors: most of the time a test waits.
    session.run("pytest", "-n", "3", "--dist", "worksteal", *session.posargs)


@nox.session(python=["3.13t", "3.14t"])
def free_threaded(session: nox.Session) -> None:
    """The tests of the blocking pools on a free-threaded Python, if the machine has one; not by default."""
    session.install(".[demo]", *group("test"))
    session.run("pytest", "tests/sync", *session.posargs, env={"PYTHON_GIL": "0"})


@nox.session
def chaos(session: nox.Session) -> None:
    """Storms of cancelled tasks, dying servers and failing callables, for 10 minutes, or as told after `--`."""
    session.install(".[demo]", *group("test"))
    session.run("python", "-m", "faults.chaos", *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def fuzz(session: nox.Session) -> None:
    """Bad input of every kind, for some ten minutes; `-- --hypothesis-seed=N` repeats a run that printed N."""
    session.install(".[demo]", *group("test"), *group("fuzz"))
    seed = [] if any("seed" in arg for arg in session.posargs) else [f"--hypothesis-seed={secrets.randbelow(2**32)}"]
    session.log("the seed: %s", " ".join([*seed, *session.posargs]))
    session.run("pytest", "--timeout=1800", *FUZZED, *seed, *session.posargs, env={"ASYNCPOOL_FUZZ_FACTOR": "40"})
    session.run("python", "tests/faults/fuzz_conninfo.py", "-max_total_time=120")


@nox.session
def coverage(session: nox.Session) -> None:
    """The tests under coverage, and what they miss."""
    session.install("--editable", ".[demo]", *group("test"), *group("coverage"))
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine")
    session.run("coverage", "report", "--show-missing", "--skip-covered")


@nox.session
def mutation(session: nox.Session) -> None:
    """Small faults put into asyncpool/_core, one at a time: does a test in virtual time find each of them?"""
    session.install(".[demo]", *group("test"), *group("mutation"))
    # mutmut lets the verdicts of last time stand for what has not changed, though the tests may have.
    shutil.rmtree("mutants", ignore_errors=True)
    session.run("mutmut", "run", *session.posargs)
    session.run("python", "tests/core/mutants.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The reference of the public names, as HTML in build/docs."""
    session.install(".", *group("docs"))
    session.run("pdoc", "asyncpool", "--output-directory", "build/docs")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Each benchmark, or those named after `--`."""
    session.install(".[demo]", *group("benchmarks"))
    for benchmark in session.posargs or BENCHMARKS:
        session.run("python", benchmark)
