"""What psycopg does not expose of libpq: the protocol and cipher of a connection's TLS, through ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from psycopg.pq.abc import PGconn

from .libpq import _loaded_libpq


def tls_attribute(pgconn: PGconn, name: str) -> str | None:
    """`protocol` or `cipher` of the connection's TLS. None without TLS, or where libpq cannot be reached."""
    ask = _find_ssl_attribute()
    address: int | None = getattr(pgconn, "pgconn_ptr", None)  # public, but not in psycopg's protocol class
    if ask is None or not address:
        return None
    answer = ask(address, name.encode())
    return answer.decode(errors="replace") if answer else None


@functools.cache
def _find_ssl_attribute() -> Callable[[int, bytes], bytes | None] | None:
    try:
        function = _loaded_libpq().PQsslAttribute
    except (AttributeError, KeyError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    function.restype = ctypes.c_char_p
    found: Callable[[int, bytes], bytes | None] = function
    return found
