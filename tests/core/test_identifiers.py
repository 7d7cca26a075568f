"""new_run_id: version 7, increasing, and unique across threads and processes."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from uuid import RFC_4122, UUID

import pytest

from flowstore_core import new_run_id


def test_ids_have_version_7() -> None:
    for _ in range(100):
        run_id = new_run_id()
        assert type(run_id) is UUID
        assert (run_id.version, run_id.variant) == (7, RFC_4122)


def test_ids_increase() -> None:
    ids = [new_run_id() for _ in range(20_000)]
    assert all(one < later for one, later in pairwise(ids))
    assert [str(one) for one in ids] == sorted(str(one) for one in ids)


def test_ids_contain_the_time() -> None:
    before = time.time_ns() // 1_000_000
    stamp = new_run_id().int >> 80
    # Earlier ids may have advanced the timestamp slightly, but not by a day.
    assert before <= stamp < before + 86_400_000
    assert datetime.fromtimestamp(stamp / 1000, UTC).year >= 2024


def test_ids_increase_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_run_id()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    ids = [new_run_id() for _ in range(10)]
    assert [first, *ids] == sorted({first, *ids})


def test_ids_of_concurrent_threads_are_unique_and_increase_in_each_thread() -> None:
    ids: list[list[UUID]] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        ids.append([new_run_id() for _ in range(2000)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one for of_thread in ids for one in of_thread}) == 16_000
    for of_thread in ids:
        assert of_thread == sorted(of_thread)
