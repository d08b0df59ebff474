"""Text in other encodings than UTF-8, and encodings that a lease has changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row

from asyncpool import Pool

if TYPE_CHECKING:
    from kit.servers import Admin

# More often than psycopg's `prepare_threshold`: first as they are, then prepared.
OFTEN = 8

TEXTS = {"utf8": "é€𝄞", "latin1": "é", "latin9": "é€", "win1251": "Привет", "euc_jp": "日本語", "big5": "中文"}
each_encoding = pytest.mark.parametrize("encoding", TEXTS)


@each_encoding
async def test_text_passes_in_each_encoding(dsn: str, encoding: str, way: dict[str, Any]) -> None:
    text = TEXTS[encoding]
    async with Pool(dsn, client_encoding=encoding, row_factory=dict_row, **way) as pool:
        for _ in range(OFTEN):
            query = f"select %s as \"{text}\", '{text}' as same, convert_to(%s::text, 'utf8') as bytes".encode()
            row = await pool.fetchrow(query.decode().encode(encoding_of(encoding)), [text, text])
            assert row == {text: text, "same": text, "bytes": text.encode()}
            assert await pool.fetchval("select %s = convert_from(%s, 'utf8')", [text, text.encode()]) is True
            assert await pool.fetchval("select %s::text[]", [[text, text]]) == [text, text]


def encoding_of(name: str) -> str:
    """Python's name of the server's."""
    return {"win1251": "cp1251", "latin9": "iso8859-15"}.get(name, name)


@each_encoding
async def test_errors_are_told_in_the_encoding_of_the_session(dsn: str, encoding: str, way: dict[str, Any]) -> None:
    text = TEXTS[encoding]
    query: Any = f"do $$ begin raise exception using message = '{text}', detail = '{text}!'; end $$"
    async with Pool(dsn, client_encoding=encoding, **way) as pool:
        for _ in range(OFTEN):
            with pytest.raises(psycopg.errors.RaiseException, match=text) as error:
                await pool.execute(query)
            assert error.value.diag.message_primary == text
            assert error.value.diag.message_detail == f"{text}!"


@each_encoding
async def test_what_the_encoding_does_not_have_is_refused_and_harms_nobody(
    dsn: str, encoding: str, way: dict[str, Any]
) -> None:
    if encoding == "utf8":
        pytest.skip("it has them all")
    async with Pool(dsn, client_encoding=encoding, **way) as pool:
        for _ in range(OFTEN):
            outcomes = await asyncio.gather(
                pool.fetchval("select %s::text", ["a"]),
                pool.fetchval("select %s::text", ["𝄞"]),  # cannot be sent
                pool.fetchval("select chr(119070) || %s::text", [""]),  # cannot be received
                pool.fetchval("select %s::text", [TEXTS[encoding]]),
                return_exceptions=True,
            )
            assert outcomes[0] == "a"
            assert isinstance(outcomes[1], UnicodeEncodeError)
            assert isinstance(outcomes[2], psycopg.errors.UntranslatableCharacter)
            assert outcomes[3] == TEXTS[encoding]


async def test_an_encoding_that_a_lease_leaves_behind_is_that_of_the_statements_after_it(
    dsn: str, admin: Admin, way: dict[str, Any]
) -> None:
    """What is set on the server stays: then psycopg reads by what the server reports, and so must a lane."""
    query: Any = "select %s::text || 'é', convert_to(%s::text, 'utf8')"
    async with Pool(dsn, max_size=1, **way) as pool:
        for encoding in ("latin1", "utf8", "latin9", "win1252", "utf8"):
            for _ in range(OFTEN):
                assert await pool.fetchrow(query, ["è", "è"]) == ("èé", "è".encode())
            async with pool.acquire() as conn:
                await conn.execute("select set_config('client_encoding', %s, false)", [encoding])
        assert pool.stats().connects == 1
