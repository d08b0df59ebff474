"""The figures of a pool at one instant, read from the machine and from what counts beside it. Any thread may ask."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from .._core.states import PoolPhase, SlotState
from ..events import PoolStats
from ..histogram import EMPTY

if TYPE_CHECKING:
    from .runner import Runner


def stats_of(name: str, sizes: tuple[int, int], runner: Runner | None, abandoned: int) -> PoolStats:
    """The sizes now, all 0 of a closed pool, and the totals of its last opening."""
    sized = runner if runner is not None and runner.phase is not PoolPhase.CLOSED else None
    machine = runner.machine if runner is not None else None
    multiplexer = runner.multiplexer if runner is not None else None

    def count(state: SlotState) -> int:
        return sized.machine.count(state) if sized is not None else 0

    # Of one that was granted it is not known yet whether the caller takes it up, and totals must not go down.
    immediate = machine.immediate if machine is not None else 0
    waited = runner.waits.count if runner is not None else 0
    acquires = immediate + waited
    begun = machine.acquires if machine is not None else 0
    ended = begun - count(SlotState.LEASED) + (multiplexer.lanes if multiplexer is not None else 0)
    return PoolStats(
        name=name,
        min_size=sizes[0],
        max_size=sizes[1],
        size=sized.machine.size if sized is not None else 0,
        connecting=count(SlotState.CONNECTING),
        idle=count(SlotState.IDLE),
        leased=count(SlotState.LEASED),
        checking=count(SlotState.CHECKING),
        recycling=count(SlotState.RECYCLING),
        closing=count(SlotState.CLOSING),
        waiting=sized.waiting if sized is not None else 0,
        acquires=acquires,
        immediate=immediate,
        waited=waited,
        timeouts=machine.timeouts + multiplexer.timeouts if machine is not None and multiplexer is not None else 0,
        cancelled=runner.cancelled + multiplexer.cancelled if runner is not None and multiplexer is not None else 0,
        returned_bad=runner.leases.returned_bad if runner is not None else 0,
        one_shots=multiplexer.answered + multiplexer.answered_in_threads if multiplexer is not None else 0,
        connects=machine.connects if machine is not None else 0,
        connect_errors=machine.connect_errors if machine is not None else 0,
        abandoned=abandoned,
        closes=MappingProxyType(dict(machine.closes) if machine is not None else {}),
        wait=runner.waits.snapshot(acquires) if runner is not None else EMPTY,
        hold=runner.leases.holds.snapshot(ended) if runner is not None else EMPTY,
        connect=runner.connects.snapshot() if runner is not None else EMPTY,
    )
