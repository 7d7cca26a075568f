"""Mutants of outputs, events and storage formats in SQLite."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from flowstore_core import RunNotFoundError, open_store
from flowstore_core.timeseries import LATEST
from tests.calls import FLOW, new_run, together
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import ended_run, error_of, raw_connection
from tests.virtual_clock import VirtualClock

OUTPUTS = "flowstore_sqlite/outputs.py"
EVENTS = "flowstore_sqlite/events.py"
CODECS = "flowstore_sqlite/codecs.py"
CONNECTION = "flowstore_sqlite/connection.py"
DATABASE = "flowstore_sqlite/database.py"
FIRST_SCHEMA = "flowstore_sqlite/migrations/0001_first_schema.sql"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("EVT-2",),
    changes=[(OUTPUTS, "DO UPDATE SET value_json = excluded.value_json", "DO NOTHING")],
)
async def first_output_wins(url: str) -> None:
    """A second write of an output changes nothing."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for value in ("1", "2"):
            await store.save_output(run_id, "total", value)
        assert await store.get_output(run_id, "total") == "2"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[(OUTPUTS, "ORDER BY output_key", "ORDER BY output_key COLLATE NOCASE")],
)
async def outputs_are_ordered_without_case(url: str) -> None:
    """get_outputs orders keys without regard to case."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for key in ("total", "Tax"):
            await store.save_output(run_id, key, "1")
        assert list(await store.get_outputs(run_id)) == ["Tax", "total"]
        await store.save_output(run_id, "Zip", "1")
        assert list(await store.get_outputs(run_id)) == ["Tax", "Zip", "total"]


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-1",),
    changes=[(OUTPUTS, "(run_id.bytes, key, value)", "(run_id.bytes, key.strip(), value)")],
)
async def output_keys_are_trimmed(url: str) -> None:
    """Blanks around the key of an output are removed when it is saved."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.save_output(run_id, " total", "1")
        assert await store.get_output(run_id, " total") == "1"


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-2", "EVT-2"),
    changes=[
        (
            FIRST_SCHEMA,
            "    value_json TEXT NOT NULL,\n    PRIMARY KEY (run_id, output_key)\n) STRICT, WITHOUT ROWID",
            "    value_json JSON NOT NULL,\n    PRIMARY KEY (run_id, output_key)\n) WITHOUT ROWID",
        )
    ],
)
async def outputs_are_stored_as_numbers(url: str) -> None:
    """The type JSON has numeric affinity, so the output 1.0 is read as the number 1."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.save_output(run_id, "total", "1.0")
        assert await store.get_output(run_id, "total") == "1.0"


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("EVT-2",),
    changes=[(FIRST_SCHEMA, "output_key TEXT NOT NULL,", "output_key TEXT NOT NULL COLLATE NOCASE,")],
)
async def output_keys_match_without_case(url: str) -> None:
    """Two outputs whose keys differ in case overwrite each other."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for key in ("total", "Total"):
            await store.save_output(run_id, key, key)
        assert await store.get_output(run_id, "total") == "total"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("EVT-1",),
    changes=[(EVENTS, "sequence > ? ORDER BY", "sequence >= ? ORDER BY")],
)
async def events_repeat_the_last_one_read(url: str) -> None:
    """get_run_events after a sequence returns the event with that sequence again."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        sequence = await store.append_event(run_id, "started")
        assert list(await store.get_run_events(run_id, after=sequence)) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("EVT-1",),
    changes=[(EVENTS, 'FROM events WHERE run_id = ?"', 'FROM events WHERE ? IS NOT NULL"')],
)
async def runs_share_one_sequence(url: str) -> None:
    """The events of all runs are numbered together, so a later run does not begin with 1."""
    async with open_store(url) as store:
        await store.append_event(await new_run(store), "started")
        assert await store.append_event(await new_run(store), "started") == 1


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("EVT-1", "CLM-2"),
    changes=[
        (
            EVENTS,
            "            sequence: int = db.execute(LAST_SEQUENCE, (run_id.bytes,)).fetchone()[0] + 1\n",
            "            if run_id not in _sequences:\n"
            "                _sequences[run_id] = db.execute(LAST_SEQUENCE, (run_id.bytes,)).fetchone()[0]\n"
            "            sequence = _sequences[run_id] = _sequences[run_id] + 1\n",
        ),
        (EVENTS, "class Events", "_sequences: dict[UUID, int] = {}\n\n\nclass Events"),
    ],
)
async def sequences_are_counted_in_memory(url: str) -> None:
    """A process counts the events of a run itself, so the events of another process take its numbers."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.append_event(run_id, "started")
        with raw_connection(url) as other_process:
            other_process.executemany(
                "INSERT INTO events (run_id, sequence, created_at, event_type) VALUES (?, ?, 0, 'other')",
                [(run_id.bytes, sequence) for sequence in range(2, 12)],
            )
        assert await error_of(store.append_event(run_id, "ended")) is None


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("UNK",),
    changes=[
        (
            EVENTS,
            "            if read_run_status(db, run_id) is None:\n"
            "                raise RunNotFoundError(run_id)\n",
            "            if run_id not in _known:\n"
            "                if read_run_status(db, run_id) is None:\n"
            "                    raise RunNotFoundError(run_id)\n"
            "                _known.add(run_id)\n",
        ),
        (EVENTS, "class Events", "_known: set[UUID] = set()\n\n\nclass Events"),
    ],
)
async def runs_with_events_are_remembered(url: str) -> None:
    """A process caches the runs that have events, and appends to one that cleanup has deleted."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await ended_run(store)
        await store.append_event(run_id, "ended")
        await store.cleanup(clock.advance(days=1))
        assert await error_of(store.append_event(run_id, "late")) is RunNotFoundError


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("INP-3",),
    changes=[
        (
            CODECS,
            "    span = at - _EPOCH\n"
            "    return (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds\n",
            "    return int(at.timestamp() * 1_000_000)\n",
        )
    ],
)
async def times_are_truncated_floats(url: str) -> None:
    """Times are stored as truncated floats, so half of the distant ones are one microsecond off."""
    times = [datetime(1500, 3, 14, 9, 26, 53, number, UTC) for number in range(0, 1_000_000, 9973)]
    async with open_store(url) as store:
        run_id = await new_run(store)
        for at in times:
            await store.configure_run(run_id, FLOW, "manual", timeout_at=at)
            control = await store.get_run_control(run_id)
            assert control is not None
            assert control.timeout_at == at


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("INP-3",),
    changes=[
        (
            CODECS,
            "return _EPOCH + timedelta(microseconds=stored)",
            "return datetime.fromtimestamp(stored / 1_000_000, UTC)",
        )
    ],
)
async def distant_times_lose_microseconds(url: str) -> None:
    """Times are read through floats, which are too coarse for the microseconds of distant years."""
    at = LATEST - timedelta(microseconds=123_457)
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=at)
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.timeout_at == at


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("INP-3",),
    changes=[(CODECS, "1_000_000 + span.microseconds", "1_000_000 + span.microseconds // 1000 * 1000")],
)
async def times_are_cut_to_milliseconds(url: str) -> None:
    """Times are stored with milliseconds only."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.started_at == clock()


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[(DATABASE, "return time.time_ns() // 1000\n", "return int(time.time()) * 1_000_000\n")],
)
async def system_clock_has_whole_seconds(url: str) -> None:
    """Without a virtual clock every time of the store is a whole second."""
    async with open_store(url) as store:
        await together(new_run(store) for _ in range(20))
        assert any(run.started_at.microsecond for run in await store.get_runs())


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("INP-2",),
    changes=[
        (CONNECTION, "        return sqlite3.connect(\n", "        db = sqlite3.connect(\n"),
        (
            CONNECTION,
            "            cached_statements=256,\n        )\n",
            "            cached_statements=256,\n        )\n"
            "        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000_000)\n        return db\n",
        ),
    ],
)
async def texts_above_ten_megabytes_are_refused(url: str) -> None:
    """The connections limit the length of a row to 10 MB."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        assert await error_of(store.save_output(run_id, "total", "x" * (16 * 1024 * 1024))) is None
        assert len(await store.get_output(run_id, "total") or "") == 16 * 1024 * 1024


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-2",),
    changes=[
        (CONNECTION, "        return sqlite3.connect(\n", "        db = sqlite3.connect(\n"),
        (
            CONNECTION,
            "            cached_statements=256,\n        )\n",
            "            cached_statements=256,\n        )\n"
            '        db.text_factory = lambda stored: stored.decode("utf-8-sig")\n        return db\n',
        ),
    ],
)
async def byte_order_mark_is_removed(url: str) -> None:
    """A text that begins with U+FEFF is read without it."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.save_output(run_id, "total", "\ufeff1")
        assert await store.get_output(run_id, "total") == "\ufeff1"


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-2",),
    changes=[
        (OUTPUTS, "import sqlite3\n", "import sqlite3\nimport unicodedata\n"),
        (
            OUTPUTS,
            "(run_id.bytes, key, value)",
            '(run_id.bytes, key, unicodedata.normalize("NFC", value))',
        ),
    ],
)
async def outputs_are_normalised(url: str) -> None:
    """An output is stored in the normal form C of Unicode."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.save_output(run_id, "total", "e\u0301")
        assert await store.get_output(run_id, "total") == "e\u0301"
