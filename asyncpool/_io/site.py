"""Where a connection was acquired: kept as code object and offset, made readable only when somebody asks."""

from __future__ import annotations

from types import CodeType


def describe_site(code: CodeType | None, offset: int) -> str:
    """`file:line in function`, from a frame's `f_code` and `f_lasti` (its `f_lineno` is slow to read)."""
    if code is None:
        return "unknown"
    line: int | None = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= offset < end:
            line = number
            break
    return f"{code.co_filename}:{line} in {code.co_qualname}"
