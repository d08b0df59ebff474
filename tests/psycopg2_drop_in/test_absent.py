"""What psycopg2 has and this has not: however it is asked for, the answer says what to use."""

from __future__ import annotations

import importlib

import pytest

from asyncpool import psycopg2


@pytest.mark.parametrize("module", ["extras", "extensions"])
def test_a_module_that_is_not_there_says_what_to_use(module: str) -> None:
    with pytest.raises(AttributeError, match=f"has no {module}: .*psycopg"):
        getattr(psycopg2, module)
    with pytest.raises(ImportError, match=f"has no {module}: .*psycopg"):
        importlib.import_module(f"asyncpool.psycopg2.{module}")
    with pytest.raises(ImportError, match=f"has no {module}: .*psycopg"):
        exec(f"from asyncpool.psycopg2 import {module}")


def test_any_other_name_that_is_not_there_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        psycopg2.nonsense  # noqa: B018  # looking is what is tested
    assert not hasattr(psycopg2, "extras")
