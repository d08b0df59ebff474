"""Who holds the connections of a pool, for those who wait for one and for those who look from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from psycopg.pq import TransactionStatus

from .._core.slot import Slot
from ..events import Holder
from .session import Session
from .site import LANE

_WORDS = {
    TransactionStatus.IDLE: "idle",
    TransactionStatus.ACTIVE: "active",
    TransactionStatus.INTRANS: "in a transaction",
    TransactionStatus.INERROR: "in a failed transaction",
    TransactionStatus.UNKNOWN: "lost",
}


def holders_of(slots: Iterable[Slot], now: float) -> list[Holder]:
    """The leases of these slots. Any thread may ask: those that have just ended are left out."""
    sessions = [(slot, slot.resource) for slot in slots]  # another thread may end one in between two looks at it
    return [_holder(slot, session, now) for slot, session in sessions if isinstance(session, Session)]


def holds(slot: Slot, owner: object) -> bool:
    """Whether this lease is that task's or thread's."""
    session = slot.resource
    return (
        isinstance(session, Session)
        and session.lease == slot.uses
        and session.holder is not None
        and session.holder() is owner
    )


def _holder(slot: Slot, session: Session, now: float) -> Holder:
    status = _WORDS[TransactionStatus(session.pgconn.transaction_status)]
    held_for = max(0.0, now - slot.leased_at)  # another thread may have taken it since
    if session.site_code is LANE:
        return Holder(LANE, held_for, session.backend_pid, transaction=status)
    if session.lease != slot.uses:  # what the session knows is of the lease before
        return Holder("unknown", held_for, session.backend_pid, owner="a caller who is being woken", transaction=status)
    owner = name_of_holder(session)
    return Holder(session.site, held_for, session.backend_pid, session.stack, owner, status)


def name_of_holder(session: Session) -> str:
    """The task or thread that took the current lease."""
    holder = session.holder() if session.holder is not None else None
    if holder is None:
        return "a task that has ended"
    if isinstance(holder, asyncio.AbstractEventLoop):
        return "no task"
    return f"task {holder.get_name()!r}" if isinstance(holder, asyncio.Task) else str(holder)


def describe(holders: list[Holder]) -> str:
    """In words, as messages have them."""
    return "; ".join(map(str, holders))
