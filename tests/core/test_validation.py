"""The fast path of each check agrees with its slow path."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from flowstore_core import InvalidArgumentError, StepStatus
from flowstore_core.timeseries import EARLIEST, LATEST
from flowstore_core.validation import (
    MAX_INT64,
    check_datetime,
    check_int,
    check_key,
    check_step_outcome,
    check_text,
)


class Text(str):
    """Always takes the slow path: the fast path is for the plain type only."""

    __slots__ = ()


class Number(int):
    pass


class Moment(datetime):
    pass


def answer(check: Callable[[], Any]) -> tuple[Any, ...]:
    try:
        value = check()
    except InvalidArgumentError as error:
        return ("refused", error.argument, str(error))
    return (type(value), value)


CHARACTERS = st.one_of(
    st.characters(codec="ascii"), st.characters(), st.sampled_from("\0\x7f\x80\ud800\udfff\U0010ffff")
)
TEXTS = st.text(CHARACTERS, max_size=12)


@given(TEXTS, st.sampled_from([1, 11, 256]))
@example("", 256)
@example("a" * 256, 256)
@example("a" * 257, 256)
@example("a\0", 256)
def test_checks_a_key_and_a_text_are_judged_alike_on_both_ways(value: str, limit: int) -> None:
    assert answer(lambda: check_key("k", value, limit)) == answer(lambda: check_key("k", Text(value), limit))
    assert answer(lambda: check_text("t", value)) == answer(lambda: check_text("t", Text(value)))


@given(st.integers(-3, 3) | st.integers(), st.integers(-1, 1), st.sampled_from([1, MAX_INT64]))
@example(MAX_INT64 + 1, 0, MAX_INT64)
def test_checks_an_int_is_judged_alike_on_both_ways(value: int, low: int, high: int) -> None:
    quick = answer(lambda: check_int("n", value, low, high))
    assert quick == answer(lambda: check_int("n", Number(value), low, high))
    accepted = low <= value <= high
    assert (quick[0] is int) is accepted


@given(st.datetimes())
@example(EARLIEST.replace(tzinfo=None))
@example(EARLIEST.replace(tzinfo=None) - timedelta(microseconds=1))
@example(LATEST.replace(tzinfo=None))
@example(LATEST.replace(tzinfo=None) + timedelta(microseconds=1))
def test_checks_a_datetime_is_judged_alike_on_both_ways(naive: datetime) -> None:
    value = naive.replace(tzinfo=UTC)
    quick = answer(lambda: check_datetime("d", value))
    fields = (*naive.timetuple()[:6], naive.microsecond)
    assert quick == answer(lambda: check_datetime("d", Moment(*fields, tzinfo=UTC)))
    # A zone with the same offset that is not the object UTC.
    zone = timezone(timedelta(0), "Z")
    assert quick == answer(lambda: check_datetime("d", naive.replace(tzinfo=zone)))
    assert answer(lambda: check_datetime("d", naive))[0] == "refused"


@given(st.sampled_from(StepStatus))
def test_checks_an_outcome_is_judged_alike_as_member_and_as_value(status: StepStatus) -> None:
    assert answer(lambda: check_step_outcome(status)) == answer(lambda: check_step_outcome(status.value))
