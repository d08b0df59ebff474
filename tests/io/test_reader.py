"""The Reader on a socket pair: what it does with generators, without a server."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
from kit.loops import on_both_loops
from kit.waiting import eventually
from psycopg import InterfaceError, OperationalError, pq
from psycopg import errors as e
from psycopg.waiting import Ready, Wait

from asyncpool._io.reader import MAX_BUSY_TIME, Reader, poll_ready

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from psycopg.pq.abc import PGconn

pytestmark = on_both_loops


class FakePGconn:
    """As much of a PGconn as a Reader looks at."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock.fileno()
        self.status = pq.ConnStatus.OK


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's end, non-blocking, and the server's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


Sockets = tuple[socket.socket, socket.socket]
Steps = Any  # a PQGen; psycopg's type for it says nothing of what tests put in


def reader_of(ours: socket.socket) -> Reader:
    return Reader(asyncio.get_running_loop(), cast("PGconn", FakePGconn(ours)))


def receive(sock: socket.socket, size: int) -> Generator[Wait, Ready, bytes]:
    """Wait for that many bytes, as psycopg's generators do."""
    got = b""
    while len(got) < size:
        ready = yield Wait.R
        if ready & Ready.R:
            got += sock.recv(size - len(got))
    return got


def send(sock: socket.socket, data: bytes) -> Generator[Wait, Ready, int]:
    """Write it all, waiting for room whenever there is none; how often that was."""
    waits = 0
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            waits += 1
            yield Wait.W
    return waits


def as_pqgen(generator: Generator[Wait, Ready, Any]) -> Steps:
    return generator


async def test_a_generator_is_sent_on_when_the_socket_is_readable(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(receive(ours, 6))))
    await asyncio.sleep(0)
    theirs.send(b"abc")
    await asyncio.sleep(0)
    assert not waiting.done()
    theirs.send(b"def")
    assert await waiting == b"abcdef"
    reader.stop()


async def test_a_generator_that_never_waits_does_not_need_the_loop(sockets: Sockets) -> None:
    ours, theirs = sockets
    assert await reader_of(ours).run(as_pqgen(send(ours, b"now"))) == 0
    assert theirs.recv(10) == b"now"


async def test_a_generator_is_sent_on_when_the_socket_is_writable_again(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    size = 20_000_000  # more than a socket's buffers hold
    waiting = asyncio.ensure_future(reader.run(as_pqgen(send(ours, b"x" * size))))
    received = 0
    theirs.setblocking(False)
    while received < size:
        try:
            received += len(theirs.recv(1_000_000))
        except BlockingIOError:
            await asyncio.sleep(0)
    assert await waiting > 0
    reader.stop()


async def test_many_waits_one_after_the_other_work(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    for number in range(50):
        theirs.send(bytes([number]))
        assert await reader.run(as_pqgen(receive(ours, 1))) == bytes([number])
    reader.stop()


async def test_a_generator_that_waits_for_both_is_told_which_it_is(sockets: Sockets) -> None:
    ours, theirs = sockets

    def until_readable() -> Generator[Wait, Ready, list[Ready]]:
        seen: list[Ready] = []
        while not seen or not seen[-1] & Ready.R:
            seen.append((yield Wait.RW if not seen else Wait.R))
        return seen

    reader = reader_of(ours)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(until_readable())))
    await asyncio.sleep(0)
    theirs.send(b"x")
    seen = await waiting
    assert seen[0] & Ready.W
    assert seen[-1] & Ready.R
    reader.stop()


async def test_what_a_generator_raises_is_raised_to_who_waits(sockets: Sockets) -> None:
    ours, theirs = sockets

    def fail() -> Generator[Wait, Ready, None]:
        yield Wait.R
        raise LookupError("mine")

    reader = reader_of(ours)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(fail())))
    await asyncio.sleep(0)
    theirs.send(b"x")
    with pytest.raises(LookupError, match="mine"):
        await waiting
    reader.stop()


async def test_an_error_of_the_socket_is_psycopgs_error(sockets: Sockets) -> None:
    ours, theirs = sockets

    def fail() -> Generator[Wait, Ready, None]:
        yield Wait.R
        raise ConnectionResetError("gone")

    reader = reader_of(ours)
    theirs.send(b"x")
    with pytest.raises(OperationalError, match="gone"):
        await reader.run(as_pqgen(fail()))
    reader.stop()


async def test_two_tasks_cannot_wait_on_one_connection(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    first = asyncio.ensure_future(reader.run(as_pqgen(receive(ours, 1))))
    await asyncio.sleep(0)
    with pytest.raises(InterfaceError, match="another task"):
        await reader.run(as_pqgen(receive(ours, 1)))
    theirs.send(b"x")
    assert await first == b"x"
    reader.stop()


async def test_a_cancelled_wait_can_be_resumed_where_it_was(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    generator = as_pqgen(receive(ours, 2))
    waiting = asyncio.ensure_future(reader.run(generator))
    await asyncio.sleep(0)
    theirs.send(b"a")
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    theirs.send(b"b")
    await asyncio.sleep(0.01)  # the loop sees what has come, and nobody takes it
    assert await reader.resume(generator) == b"ab"
    reader.stop()


async def test_a_new_generator_may_follow_a_cancelled_one(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(receive(ours, 1))))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    theirs.send(b"x")
    assert await reader.run(as_pqgen(receive(ours, 1))) == b"x"
    reader.stop()


async def test_a_wait_expires_with_what_notifies_expects(sockets: Sockets) -> None:
    ours, _ = sockets
    reader = reader_of(ours)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(receive(ours, 1))))
    await asyncio.sleep(0)
    reader.expire()
    with pytest.raises(e._WaitTimeout):
        await waiting
    reader.expire()
    reader.stop()


async def test_what_has_arrived_by_the_deadline_is_not_lost_to_it(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(receive(ours, 1))))
    await asyncio.sleep(0)
    theirs.send(b"x")
    reader.expire()  # in the same turn of the loop, which has not seen it yet
    assert await waiting == b"x"
    reader.stop()


async def test_the_end_of_the_connection_ends_the_wait(sockets: Sockets) -> None:
    ours, theirs = sockets

    def until_end(pgconn: FakePGconn) -> Generator[Wait, Ready, None]:
        yield Wait.R
        assert ours.recv(1) == b""
        pgconn.status = pq.ConnStatus.BAD
        raise OperationalError("server closed the connection")

    pgconn = FakePGconn(ours)
    reader = Reader(asyncio.get_running_loop(), cast("PGconn", pgconn))
    lost: list[bool] = []
    reader.on_lost = lambda: lost.append(True)
    waiting = asyncio.ensure_future(reader.run(as_pqgen(until_end(pgconn))))
    await asyncio.sleep(0)
    theirs.close()
    with pytest.raises(OperationalError, match="server closed"):
        await waiting
    assert lost == [True]
    assert not asyncio.get_running_loop().remove_reader(ours.fileno()), "the loop knows it no more"


async def test_a_finished_connection_fails_the_wait(sockets: Sockets) -> None:
    ours, _ = sockets
    pgconn = FakePGconn(ours)
    reader = Reader(asyncio.get_running_loop(), cast("PGconn", pgconn))
    waiting = asyncio.ensure_future(reader.run(as_pqgen(never_mind())))
    await asyncio.sleep(0)
    pgconn.status = pq.ConnStatus.BAD
    reader.stop()
    reader.fail()
    with pytest.raises(OperationalError, match="connection is closed"):
        await waiting
    with pytest.raises(OperationalError, match="connection is closed"):
        await reader.run(as_pqgen(never_mind()))


def never_mind() -> Generator[Wait, Ready, None]:
    while True:
        yield Wait.R


async def test_the_loop_does_not_spin_on_what_nobody_reads(sockets: Sockets) -> None:
    """A notification, a notice, the server's last words: they stay in the socket until somebody waits again."""
    ours, theirs = sockets
    loop = asyncio.get_running_loop()
    reader = reader_of(ours)
    theirs.send(b"a")
    assert await reader.run(as_pqgen(receive(ours, 1))) == b"a"
    theirs.send(b"unread")
    await eventually(lambda: not reader._reading)
    assert not loop.remove_reader(ours.fileno())
    assert await reader.run(as_pqgen(receive(ours, 6))) == b"unread"
    reader.stop()


async def test_it_is_known_when_the_server_was_last_heard(sockets: Sockets) -> None:
    ours, theirs = sockets
    reader = reader_of(ours)
    began = time.monotonic()
    waiting = asyncio.ensure_future(reader.run(as_pqgen(receive(ours, 1))))
    await asyncio.sleep(0.01)
    theirs.send(b"x")
    await waiting
    assert reader.answered_at > began + 0.005
    heard = reader.answered_at
    await reader.run(as_pqgen(send(ours, b"a question is no answer")))
    assert reader.answered_at == heard
    reader.stop()


async def test_other_tasks_get_their_turn_beside_one_that_never_has_to_wait(sockets: Sockets) -> None:
    ours, _ = sockets
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def write_slowly() -> Generator[Wait, Ready, None]:
        for _ in range(20):
            time.sleep(MAX_BUSY_TIME / 2)
            yield Wait.W

    other = asyncio.ensure_future(count())
    reader = reader_of(ours)
    await asyncio.sleep(0)
    before = turns
    await reader.run(as_pqgen(write_slowly()))
    assert turns - before >= 5
    other.cancel()
    reader.stop()


async def test_stopping_twice_and_before_any_wait_is_harmless(sockets: Sockets) -> None:
    ours, _ = sockets
    reader = reader_of(ours)
    reader.stop()
    reader.stop()
    reader.fail()
    reader.expire()


async def test_poll_ready_tells_reading_from_writing(sockets: Sockets) -> None:
    ours, theirs = sockets
    fd = ours.fileno()
    assert poll_ready(fd, int(Wait.R)) == 0
    assert poll_ready(fd, int(Wait.RW)) == Ready.W
    theirs.send(b"x")
    assert poll_ready(fd, int(Wait.RW)) == Ready.RW
    assert poll_ready(fd, int(Wait.R)) == Ready.R
    theirs.close()
    ours.recv(1)
    assert poll_ready(fd, int(Wait.R)) == Ready.R
