"""The two life cycles, a slot's and the pool's, and the moves that are legal in them."""

from __future__ import annotations

from enum import IntEnum


class SlotState(IntEnum):
    """Where a slot is. An IntEnum, because it indexes the hot path's tables."""

    CONNECTING = 0
    IDLE = 1
    LEASED = 2
    CHECKING = 3
    RECYCLING = 4
    CLOSING = 5
    GONE = 6


_S = SlotState

LEGAL_MOVES: dict[SlotState, frozenset[SlotState]] = {
    _S.CONNECTING: frozenset({_S.IDLE, _S.CLOSING, _S.GONE}),
    _S.IDLE: frozenset({_S.LEASED, _S.CHECKING, _S.CLOSING}),
    _S.LEASED: frozenset({_S.IDLE, _S.RECYCLING, _S.CLOSING}),
    _S.CHECKING: frozenset({_S.IDLE, _S.CLOSING}),
    _S.RECYCLING: frozenset({_S.IDLE, _S.CLOSING}),
    _S.CLOSING: frozenset({_S.GONE}),
    _S.GONE: frozenset(),
}


class PoolPhase(IntEnum):
    """Where the pool is. OPENING lasts until `min_size` is connected; both it and OPEN serve requests."""

    CLOSED = 0
    OPENING = 1
    OPEN = 2
    CLOSING = 3


LEGAL_PHASES: dict[PoolPhase, frozenset[PoolPhase]] = {
    PoolPhase.CLOSED: frozenset({PoolPhase.OPENING}),
    PoolPhase.OPENING: frozenset({PoolPhase.OPEN, PoolPhase.CLOSING}),
    PoolPhase.OPEN: frozenset({PoolPhase.CLOSING}),
    PoolPhase.CLOSING: frozenset({PoolPhase.CLOSED}),
}
