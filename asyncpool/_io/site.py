"""Where a connection was acquired: kept as code object and offset, made readable only when somebody asks."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from types import CodeType, FrameType

# In the place of code, for a lease of the pool's own.
LANE = "one-shot statements"


def describe_site(code: CodeType | str | None, offset: int) -> str:
    """`file:line in function`, from a frame's `f_code` and `f_lasti` (its `f_lineno` is slow to read)."""
    if code is None or isinstance(code, str):
        return code or "unknown"
    line: int | None = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= offset < end:
            line = number
            break
    return f"{code.co_filename}:{line} in {code.co_qualname}"


def is_generator(code: CodeType | str | None) -> bool:
    """Whether this is a generator's, sync or async. What that is in the midst of may be ended from elsewhere."""
    return isinstance(code, CodeType) and bool(code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))


# In these frames somebody acquires on behalf of the one outside of them.
_PACKAGE = __name__.partition(".")[0] + "."


def describe_stack() -> str:
    """The calls that led into the pool, outermost first; those inside of it are left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_inside(frame):
        frame = frame.f_back
    return "".join(traceback.format_stack(frame))


def _is_inside(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module.startswith(_PACKAGE) or module == contextlib.__name__
