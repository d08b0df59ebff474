"""What becomes of a one-shot statement whose own connection is lost: again, its own error, or nobody knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from psycopg import OperationalError, ProgrammingError, pq

from asyncpool import StatementOutcomeUnknown
from asyncpool._core.lanes import MAX_SENDS, Pace
from asyncpool._io.one_shot import what_was_lost
from asyncpool._io.statement import TEXT, OneShot

LOST = OperationalError("the connection is lost")


def pipe_of(status: pq.ConnStatus) -> Any:
    return SimpleNamespace(session=SimpleNamespace(pgconn=SimpleNamespace(status=status)), last_words=None)


BROKEN = pipe_of(pq.ConnStatus.BAD)


def statement(*, is_sent: bool, sends: int = 0, retry: bool = False) -> OneShot:
    made = OneShot("select 1", None, Pace(), retry=retry, result_format=TEXT)
    made.is_sent, made.sends = is_sent, sends
    return made


def test_an_error_while_the_connection_works_is_raised_as_it_is() -> None:
    with pytest.raises(OperationalError) as error:
        what_was_lost("orders", pipe_of(pq.ConnStatus.OK), statement(is_sent=True), LOST)
    assert error.value is LOST


def test_a_statement_with_an_error_of_its_own_is_done_with() -> None:
    failed = statement(is_sent=False)
    failed.error = ProgrammingError("cannot adapt")
    assert what_was_lost("orders", BROKEN, failed, LOST) is None
    assert failed.is_sent  # so that nobody sends it again
    assert isinstance(failed.error, ProgrammingError)


def test_what_was_not_sent_is_sent_on_another_connection_some_times() -> None:
    unsent = statement(is_sent=False)
    for _ in range(MAX_SENDS - 1):
        assert what_was_lost("orders", BROKEN, unsent, LOST) is None
        assert not unsent.is_sent
    with pytest.raises(OperationalError) as error:
        what_was_lost("orders", BROKEN, unsent, LOST)
    assert error.value is LOST


def test_of_what_was_sent_nobody_knows() -> None:
    lost = what_was_lost("orders", BROKEN, statement(is_sent=True, sends=1), LOST)
    assert isinstance(lost, StatementOutcomeUnknown)
    assert lost.__cause__ is LOST


@pytest.mark.parametrize(("sends", "is_over"), [(MAX_SENDS - 1, False), (MAX_SENDS, True)])
def test_what_only_reads_is_sent_again_some_times(sends: int, is_over: bool) -> None:
    reading = statement(is_sent=True, sends=sends, retry=True)
    lost = what_was_lost("orders", BROKEN, reading, LOST)
    assert isinstance(lost, StatementOutcomeUnknown) == is_over
    assert reading.is_sent == is_over
