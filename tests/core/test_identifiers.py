"""new_run_id: version 7, increasing, and unique across threads and processes."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from uuid import RFC_4122, UUID

import pytest

from flowstore_core import new_run_id


def test_identifiers_are_of_version_7() -> None:
    for _ in range(100):
        made = new_run_id()
        assert type(made) is UUID
        assert (made.version, made.variant) == (7, RFC_4122)


def test_identifiers_rise_strictly() -> None:
    made = [new_run_id() for _ in range(20_000)]
    assert all(one < later for one, later in pairwise(made))
    assert [str(one) for one in made] == sorted(str(one) for one in made)


def test_identifiers_hold_the_time() -> None:
    before = time.time_ns() // 1_000_000
    stamp = new_run_id().int >> 80
    # Earlier ids may have advanced it a little, but never by a day.
    assert before <= stamp < before + 86_400_000
    assert datetime.fromtimestamp(stamp / 1000, UTC).year >= 2024


def test_identifiers_rise_when_the_clock_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_run_id()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    made = [new_run_id() for _ in range(10)]
    assert [first, *made] == sorted({first, *made})


def test_identifiers_of_many_threads_are_distinct_and_rise_in_each() -> None:
    made: list[list[UUID]] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        made.append([new_run_id() for _ in range(2000)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one for mine in made for one in mine}) == 16_000
    for mine in made:
        assert mine == sorted(mine)
