"""The disconnect watch on socket pairs."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING

import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually

from asyncpool._io import watch as watch_module
from asyncpool._io.watch import DisconnectWatch, peer_has_closed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = on_both_loops


class Watched:
    """A watch with what it reported, and the sockets of the test."""

    def __init__(self) -> None:
        self.reported: list[str] = []
        self.watch: DisconnectWatch[str] = DisconnectWatch(asyncio.get_running_loop(), self.reported.append)
        self.sockets: list[socket.socket] = []

    def pair(self, name: str | None = None) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self.sockets += ours, theirs
        if name is not None:
            self.watch.register(ours.fileno(), name)
        return ours, theirs

    def close(self) -> None:
        self.watch.close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    watched = Watched()
    yield watched
    watched.close()


async def test_a_peer_that_closes_is_reported_once(watched: Watched) -> None:
    _, theirs = watched.pair("one")
    watched.pair("two")
    theirs.close()
    await eventually(lambda: watched.reported == ["one"])
    watched.watch.poll()
    assert watched.reported == ["one"]


async def test_many_at_once_are_all_reported(watched: Watched) -> None:
    pairs = [watched.pair(f"{number}") for number in range(200)]
    for _, theirs in pairs:
        theirs.close()
    await eventually(lambda: sorted(watched.reported, key=int) == [f"{number}" for number in range(200)])


async def test_a_busy_loop_can_ask_at_once(watched: Watched) -> None:
    _, theirs = watched.pair("one")
    theirs.close()
    assert watched.reported == []
    watched.watch.poll()
    assert watched.reported == ["one"]


async def test_when_it_was_last_looked_at_is_known(watched: Watched) -> None:
    before = time.monotonic()
    watched.watch.poll()
    assert before <= watched.watch.polled_at <= time.monotonic()


async def test_a_peer_that_closes_after_its_last_words_is_reported_though_they_are_unread(watched: Watched) -> None:
    _, theirs = watched.pair("one")
    theirs.send(b"terminating connection due to administrator command")
    theirs.close()
    await eventually(lambda: watched.reported == ["one"])


async def test_a_peer_that_shuts_its_sending_side_down_is_reported(watched: Watched) -> None:
    _, theirs = watched.pair("one")
    theirs.shutdown(socket.SHUT_WR)
    await eventually(lambda: watched.reported == ["one"])


async def test_one_that_was_closed_before_it_was_registered_is_reported(watched: Watched) -> None:
    ours, theirs = watched.pair()
    theirs.close()
    watched.watch.register(ours.fileno(), "one")
    await eventually(lambda: watched.reported == ["one"])


async def test_traffic_is_no_news(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = watched.pair("one")
    _, last = watched.pair("last")
    looks: list[int] = []

    def look(fd: int) -> bool:
        looks.append(fd)
        return peer_has_closed(fd)

    monkeypatch.setattr(watch_module, "peer_has_closed", look)
    for _ in range(100):
        theirs.send(b"rows")
        ours.send(b"a query")
        await asyncio.sleep(0)
        ours.recv(10)
        theirs.recv(10)
    last.close()
    await eventually(lambda: watched.reported == ["last"])
    assert looks == [watched.sockets[2].fileno()]


async def test_what_was_unregistered_is_not_reported(watched: Watched) -> None:
    ours, theirs = watched.pair("one")
    watched.watch.unregister(ours.fileno(), "one")
    watched.watch.unregister(ours.fileno(), "one")
    theirs.close()
    _, last = watched.pair("last")
    last.close()
    await eventually(lambda: watched.reported == ["last"])


async def test_a_socket_that_was_closed_may_still_be_unregistered(watched: Watched) -> None:
    ours, _ = watched.pair("one")
    fd = ours.fileno()
    ours.close()
    watched.watch.unregister(fd, "one")
    watched.watch.poll()
    assert watched.reported == []


async def test_a_late_unregister_leaves_the_numbers_new_owner_watched(watched: Watched) -> None:
    ours, _ = watched.pair("old")
    fd = ours.fileno()
    ours.close()
    new, theirs = watched.pair()
    while new.fileno() != fd:
        new, theirs = watched.pair()
    watched.watch.register(fd, "new")
    watched.watch.unregister(fd, "old")
    theirs.close()
    await eventually(lambda: watched.reported == ["new"])


async def test_a_registration_that_a_duplicate_keeps_alive_is_not_believed(watched: Watched) -> None:
    """The kernel forgets a registration when the last descriptor for the socket goes, not when ours does."""
    ours, theirs = watched.pair("old")
    fd = ours.fileno()
    duplicate = ours.dup()
    watched.sockets.append(duplicate)
    ours.close()
    new, new_theirs = watched.pair()
    while new.fileno() != fd:
        new, new_theirs = watched.pair()
    watched.watch._items[fd] = "new"  # its own registration aside: only the old one can speak
    theirs.close()
    _, last = watched.pair("last")
    last.close()
    await eventually(lambda: watched.reported == ["last"])
    assert not peer_has_closed(fd)
    new_theirs.close()
    assert peer_has_closed(fd)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
async def test_a_forked_child_takes_no_news_from_its_parent(watched: Watched) -> None:
    """The kernel's object behind the watch is shared, and what one of them fetches the other never sees."""
    _, theirs = watched.pair("one")
    start, told = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of threads that other tests have left
        child = os.fork()
    if child == 0:
        # No assertion and no exception gets out of here.
        code = 1
        try:
            theirs.close()
            os.read(start, 1)
            watched.watch.poll()
            watched.watch.close()
            code = len(watched.reported)
        finally:
            os._exit(code)
    theirs.close()
    os.write(told, b"!")
    _, status = os.waitpid(child, 0)  # noqa: ASYNC222  # the loop is not to see it first
    os.close(start)
    os.close(told)
    assert os.waitstatus_to_exitcode(status) == 0
    watched.watch.poll()
    assert watched.reported == ["one"]


async def test_a_closed_watch_reports_nothing_and_may_be_closed_again(watched: Watched) -> None:
    _, theirs = watched.pair("one")
    watched.watch.close()
    watched.watch.close()
    theirs.close()
    await asyncio.sleep(0)
    assert watched.reported == []


async def test_without_epoll_and_kqueue_it_looks_when_it_is_asked_to(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_make_poller", lambda: None)
    reported: list[str] = []
    watch: DisconnectWatch[str] = DisconnectWatch(asyncio.get_running_loop(), reported.append)
    ours, theirs = watched.pair()
    other, _ = watched.pair()
    watch.register(ours.fileno(), "one")
    watch.register(other.fileno(), "two")
    theirs.close()
    watch.poll()
    assert reported == ["one"]
    watch.unregister(ours.fileno(), "one")
    watch.poll()
    assert reported == ["one"]
    watch.close()


async def test_peer_has_closed_knows_open_from_closed(watched: Watched) -> None:
    ours, theirs = watched.pair()
    assert not peer_has_closed(ours.fileno())
    theirs.send(b"x")
    assert not peer_has_closed(ours.fileno())
    theirs.close()
    if sys.platform != "linux":
        ours.recv(1)
    assert peer_has_closed(ours.fileno())
