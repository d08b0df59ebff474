"""Which commands may run as one-shot statements, on a connection that is shared by many callers.

Refused is what opens or ends a transaction, and what leaves something in the session or looks for it there. A BEGIN
that slipped through would take the statements of all other callers into its transaction. So the text is read as the
server's scanner (scan.l) reads it, with its comments, quotes and case, and as far as it takes to know.

What a function does cannot be seen (`set_config`, `pg_advisory_lock`), nor a `search_path` that begins with pg_temp.

Client encodings: in SJIS, BIG5, GBK, UHC, JOHAB and GB18030 the second byte of a character may be an ASCII one, but
only from `0` on. White space, quotes and what comments are made of lie below, so that no command can hide before the
first word. (Bytes that are no BIG5 could, in a database in EUC_TW or MULE_INTERNAL, which does not check them; psycopg
encodes no str to such.) What comes after that is read as if it were UTF-8. Where such a byte is a backslash in an `E''`
string, or stands in the tag of a dollar quote, an INTO TEMP behind it may be missed, or seen where there is none; so it
may be where `standard_conforming_strings` is off. A temporary table is then left in a session, or a statement refused.
"""

from __future__ import annotations

import re
from itertools import chain, dropwhile, islice, pairwise, starmap, takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COMMANDS = {
    name.partition(" ")[0].lower().encode(): name
    for name in (
        # Transactions. LOCK and SAVEPOINT have a meaning only inside of one.
        *("BEGIN", "START TRANSACTION", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE", "LOCK"),
        # The session's settings and libraries. SET LOCAL and SET CONSTRAINTS would have no effect.
        *("SET", "RESET", "DISCARD", "LOAD"),
        # Notifications; to send them is no matter.
        *("LISTEN", "UNLISTEN"),
        # Cursors.
        *("DECLARE", "FETCH", "MOVE", "CLOSE"),
        # Statements that the user prepared, and PREPARE TRANSACTION.
        *("PREPARE", "EXECUTE", "DEALLOCATE"),
        # A protocol of its own.
        "COPY",
    )
}

# COMMIT PREPARED and ROLLBACK PREPARED end a transaction that belongs to no session.
MAY_BE_PREPARED = frozenset((b"commit", b"rollback"))

TEMPORARY = frozenset((b"temp", b"temporary"))
BEFORE_TEMPORARY = frozenset((b"or", b"replace", b"local", b"global"))

# `pg_temp` and `pg_temp_3`, as a word, in quotes, or with any of its letters as code points after any escape character.
_ESCAPED = b"".join(rb"(?:%c|[^\"](?:\+00)?00(?i:%02x))" % (letter, letter) for letter in b"pg_temp")
TEMPORARY_SCHEMA = re.compile(rb'pg_temp(?:_\d+)?|"pg_temp(?:_\d+)?"|[uU]&"%b(?:_\d+)?"' % _ESCAPED)

# The parentheses are those of options, or of the whole statement that is explained.
EXPLAIN_OPTIONS = frozenset((b"analyze", b"analyse", b"verbose", b"("))

# What may come after the name of a table in SELECT INTO; all reserved, so that none of them is the name.
AFTER_TARGET = frozenset(
    b"from where group having window union intersect except order limit offset fetch for ; )".split()
)

# A quick look at a text in lower case: without this, or a name of the temporary schema, there is no INTO TEMP.
INTO_TEMPORARY = re.compile(rb"into\s*+(?:(?:local|global|temp|temporary)\b|--|/\*)")

# Everything the scanner tells apart, as far as it matters where it ends. What is not terminated ends with the text:
# the server refuses it. White space is `\v` too, since version 16. An `E''` goes on in the next quotes after a newline.
TOKEN = re.compile(
    rb"""
      (?P<space>    \s++ | --[^\n\r]*+ )
    | (?P<comment>  /\* )
    | (?P<dollar>   \$ (?:[a-z_\x80-\xff][a-z0-9_\x80-\xff]*+)?+ \$ )
    | (?P<string>   '[^']*+'?+
                  | e'(?:[^'\\]++|\\.|'')*+
                    (?:'(?:[\ \t\f\v]|--[^\n\r]*+)*+[\n\r](?:\s|--[^\n\r]*+[\n\r])*+'(?:[^'\\]++|\\.|'')*+)*+'?+ )
    | (?P<name>     (?:u&)?+"(?:[^"]++|"")*+"?+ )
    | (?P<word>     [a-z_\x80-\xff][a-z0-9_$\x80-\xff]*+ )
    | (?P<number>   \d++(?:\.\d*+)?+(?:e[-+]?+\d++)?+ )
    | (?P<other>    . )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
COMMENT_EDGE = re.compile(rb"/\*|\*/")


def needs_session(query: bytes) -> str | None:
    """The name of the command in `query`, if it needs a session of its own or would leave something behind in one.

    None if it may run as a one-shot statement. What the server refuses anyway may get either answer.
    """
    query = query.partition(b"\0")[0]  # libpq sends no more than that
    words = _outside_parentheses(_tokens(query))
    # The server's parser drops empty statements, and what is left is a single one to it.
    first = next((word for word in words if word != b";"), b"")
    explained = first == b"explain"
    if explained:
        # EXPLAIN ANALYZE does what it explains; of EXPLAIN alone nobody asks for such in a one-shot statement.
        first = next((word for word in words if word not in EXPLAIN_OPTIONS), b"")
    if first in COMMANDS:
        is_prepared = first in MAY_BE_PREPARED and next(words, b"") == b"prepared"
        return None if is_prepared else COMMANDS[first]
    if first == b"create":
        return _temporary_creation(words)
    if first == b"import":
        return "IMPORT FOREIGN SCHEMA INTO pg_temp" if any(starmap(_is_in_temporary_schema, pairwise(words))) else None
    # Other commands have no INTO, or one that creates nothing.
    if (explained or first in (b"select", b"with", b"(")) and _selects_into_temporary(query):
        return "SELECT INTO TEMPORARY"
    return None


def remedy(name: str, command: str) -> str:
    """What the user is told of a `command` that the pool of that name does not run as a one-shot statement."""
    return f"{name}: {command} needs a connection of its own: take one with pool.acquire()"


def _tokens(query: bytes) -> Iterator[bytes]:
    """What the server's parser gets to see: words in lower case, names in quotes as they are, a quote for a string."""
    position = 0
    while match := TOKEN.match(query, position):
        kind, text, position = match.lastgroup, match[0], match.end()
        if kind == "comment":
            position = _end_of_comment(query, position)
        elif kind == "dollar":
            end = query.find(text, position)
            position = len(query) if end < 0 else end + len(text)
            yield b"'"
        elif kind == "string":
            yield b"'"
        elif kind == "word":
            yield text.lower()
        elif kind != "space":
            yield text


def _end_of_comment(query: bytes, position: int) -> int:
    """Where the comment ends whose opening ends at `position`: they nest."""
    depth = 1
    for edge in COMMENT_EDGE.finditer(query, position):
        depth += 1 if edge[0] == b"/*" else -1
        if depth == 0:
            return edge.end()
    return len(query)


def _outside_parentheses(tokens: Iterable[bytes]) -> Iterator[bytes]:
    """What is not in parentheses; for those that are, the opening one."""
    depth = 0
    for token in tokens:
        if token == b")":
            depth -= 1
            continue
        if depth == 0:
            yield token
        if token == b"(":
            depth += 1


def _temporary_creation(words: Iterator[bytes]) -> str | None:
    """The name of a CREATE that goes on with `words`, if it is temporary or made of a prepared statement."""
    rest = dropwhile(BEFORE_TEMPORARY.__contains__, words)
    first = next(rest, b"")
    if first in TEMPORARY:
        kind = next((word for word in rest if word != b"recursive"), b"")
        return f"CREATE TEMPORARY {kind.decode('ascii', 'replace').upper()}"
    for word, following in pairwise(chain((first,), rest)):
        if word == b"as":
            # From here on names are only read.
            return "CREATE TABLE AS EXECUTE" if following == b"execute" else None
        if _is_in_temporary_schema(word, following):
            return "CREATE in pg_temp"
    return None


def _is_in_temporary_schema(word: bytes, following: bytes) -> bool:
    if word == b"into":
        return TEMPORARY_SCHEMA.fullmatch(following) is not None
    return following in (b".", b"uescape") and TEMPORARY_SCHEMA.fullmatch(word) is not None


def _selects_into_temporary(query: bytes) -> bool:
    """Whether a SELECT in it has an INTO that creates a temporary table."""
    lowered = query.lower()
    if b"into" not in lowered:
        return False
    # A long text is not worth reading for the INTO of an INSERT or MERGE.
    if not (b"pg_temp" in lowered or b'u&"' in lowered or INTO_TEMPORARY.search(lowered)):
        return False
    tokens = _tokens(query)
    # In each of the parentheses that are open, whether there was a SELECT. INSERT and MERGE have their INTO before any.
    selecting = [False]
    previous = b""
    for token in tokens:
        if token == b"(":
            selecting.append(False)
        elif token == b")":
            if len(selecting) > 1:
                selecting.pop()
        elif previous in (b".", b"as"):
            pass  # The name of a column, whatever the word.
        elif token == b"select":
            selecting[-1] = True
        elif token == b"into" and selecting[-1]:
            return _is_temporary_target(tokens)
        previous = token
    return False


def _is_temporary_target(tokens: Iterator[bytes]) -> bool:
    """Whether an INTO that goes on with `tokens` names a temporary table, not one that is called `temp`."""
    target = list(takewhile(lambda token: token not in AFTER_TARGET, islice(tokens, 6)))
    words = list(dropwhile(BEFORE_TEMPORARY.__contains__, target))
    is_declared = len(words) > 1 and words[0] in TEMPORARY and words[1] != b"."
    return is_declared or any(starmap(_is_in_temporary_schema, pairwise(target)))
