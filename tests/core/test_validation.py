"""The fast path and the slow path of each check have the same result."""

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


class StrSubclass(str):
    """Takes the slow path, because the fast path handles only plain str."""

    __slots__ = ()


class IntSubclass(int):
    pass


class DatetimeSubclass(datetime):
    pass


def result_of(check: Callable[[], Any]) -> tuple[Any, ...]:
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
def test_keys_and_texts_have_the_same_result_on_both_paths(value: str, limit: int) -> None:
    assert result_of(lambda: check_key("k", value, limit)) == result_of(
        lambda: check_key("k", StrSubclass(value), limit)
    )
    assert result_of(lambda: check_text("t", value)) == result_of(lambda: check_text("t", StrSubclass(value)))


@given(st.integers(-3, 3) | st.integers(), st.integers(-1, 1), st.sampled_from([1, MAX_INT64]))
@example(MAX_INT64 + 1, 0, MAX_INT64)
def test_ints_have_the_same_result_on_both_paths(value: int, low: int, high: int) -> None:
    fast = result_of(lambda: check_int("n", value, low, high))
    assert fast == result_of(lambda: check_int("n", IntSubclass(value), low, high))
    accepted = low <= value <= high
    assert (fast[0] is int) is accepted


@given(st.datetimes())
@example(EARLIEST.replace(tzinfo=None))
@example(EARLIEST.replace(tzinfo=None) - timedelta(microseconds=1))
@example(LATEST.replace(tzinfo=None))
@example(LATEST.replace(tzinfo=None) + timedelta(microseconds=1))
def test_datetimes_have_the_same_result_on_both_paths(naive: datetime) -> None:
    value = naive.replace(tzinfo=UTC)
    fast = result_of(lambda: check_datetime("d", value))
    fields = (*naive.timetuple()[:6], naive.microsecond)
    assert fast == result_of(lambda: check_datetime("d", DatetimeSubclass(*fields, tzinfo=UTC)))
    # A zone with the same offset that is not the object UTC.
    zone = timezone(timedelta(0), "Z")
    assert fast == result_of(lambda: check_datetime("d", naive.replace(tzinfo=zone)))
    assert result_of(lambda: check_datetime("d", naive))[0] == "refused"


@given(st.sampled_from(StepStatus))
def test_an_outcome_may_be_a_member_or_its_value(status: StepStatus) -> None:
    assert result_of(lambda: check_step_outcome(status)) == result_of(
        lambda: check_step_outcome(status.value)
    )
