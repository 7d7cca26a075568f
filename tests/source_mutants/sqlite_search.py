"""Mutants of searches and of their trigram index in SQLite.

cleanup with an old cutoff deletes nothing and indexes every run that has ended.
"""

from __future__ import annotations

from uuid import UUID

from flowstore_core import FlowStore, RunStatus, StepStatus, open_store
from flowstore_core.timeseries import EARLIEST
from tests.calls import new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import ended_run, error_of, new_step

SEARCH = "flowstore_sqlite/search.py"
MIGRATION = "flowstore_sqlite/migrations/0005_queues.sql"


async def _is_found(store: FlowStore, text: str) -> bool:
    return (await store.get_runs_page(search=text)).total_count == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "            instr(CAST(lower(substr(CAST(attempts.error_message AS BLOB), 1, "
            ":max_length)) AS BLOB), :bytes)\n"
            "            OR instr(",
            "            instr(",
        )
    ],
)
async def errors_of_earlier_attempts_are_not_searched(url: str) -> None:
    """A search reads the outputs of earlier attempts but not their errors."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED, error_message="declined")
        await new_step(store, run_id)
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "substr(CAST(error_message AS BLOB), 1, :max_length)",
            "substr(error_message, 1, :max_length)",
        )
    ],
)
async def searched_length_is_measured_in_characters(url: str) -> None:
    """A search reads 64 Ki characters of an error message instead of 64 KiB."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        error = "é" * 40_000 + "declined"
        await new_step(store, run_id, status=StepStatus.FAILED, error_message=error)
        assert not await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            '"bytes": needle.encode(), "max_length": SEARCHED_BYTES}',
            '"bytes": needle.encode(), "max_length": 64_000}',
        )
    ],
)
async def searches_read_64000_bytes(url: str) -> None:
    """A search reads 64,000 bytes of an output instead of 65,536."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, output_json="x" * (65_536 - 8) + "declined")
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("QRY-2",),
    changes=[(SEARCH, "instr(lower(flow_name), :needle)", "flow_name LIKE '%' || :needle || '%'")],
)
async def underscore_matches_any_character(url: str) -> None:
    """The characters _ and % are wildcards in a search of flow names."""
    async with open_store(url) as store:
        await new_run(store, flow_name="orders-eu")
        assert not await _is_found(store, "orders_eu")


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-2",),
    changes=[(SEARCH, "|| substr(hex(run_id), 21)", "|| substr(hex(run_id), 21, 11)")],
)
async def last_digit_of_the_id_is_not_searched(url: str) -> None:
    """A search for a whole run id finds nothing, because its last digit is not read."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        assert await _is_found(store, str(run_id))


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "WHERE attempts.run_id = runs.run_id AND steps.status IS NOT NULL AND (",
            "WHERE attempts.run_id = runs.run_id AND (",
        )
    ],
)
async def attempts_of_reset_steps_are_searched(url: str) -> None:
    """A search finds a run by an attempt of a step that was reset, which no detail shows."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.record_skipped_step(run_id, "ship", "http", "declined")
        await store.retry_step(run_id, "charge", reset=["ship"])
        assert not await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("QRY-2", "CON-2"),
    changes=[(SEARCH, "one.replace('\"', '\"\"')", "one")],
)
async def quotes_break_the_index_query(url: str) -> None:
    """A search for a text with a quotation mark fails, because FTS5 takes it for its own syntax."""
    async with open_store(url) as store:
        await new_run(store, flow_name='say "hello"')
        assert await error_of(store.get_runs_page(search='say "hello"')) is None


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[(MIGRATION, "WHEN OLD.searched_open OR (OLD.status", "WHEN (OLD.status")],
)
async def late_results_are_not_indexed(url: str) -> None:
    """The result of an attempt that was open when its run was indexed is not searched."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.cleanup(EARLIEST)
        await store.record_step_complete(run_id, "charge", StepStatus.FAILED, error_message="declined")
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "SET searched_open = 1 WHERE run_id = ? AND status IN ('Pending', 'Running')",
            "SET searched_open = 1 WHERE run_id = ? AND status = 'Running'",
        )
    ],
)
async def late_skip_of_a_pending_step_is_not_indexed(url: str) -> None:
    """The reason of a Pending step that is skipped after its run was indexed is not searched."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.PENDING)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.cleanup(EARLIEST)
        await store.record_skipped_step(run_id, "charge", "http", "declined")
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            MIGRATION,
            "WHEN OLD.searched_open OR (OLD.status IS NULL AND NEW.status = 'Skipped') BEGIN",
            "WHEN OLD.searched_open BEGIN",
        )
    ],
)
async def late_skip_of_a_claimed_key_is_not_indexed(url: str) -> None:
    """The reason of a claimed key that is skipped after its run was indexed is not searched."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.cleanup(EARLIEST)
        await store.record_skipped_step(run_id, "charge", "http", "declined")
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "AFTER INSERT ON steps WHEN NEW.status = 'Skipped' BEGIN",
            "AFTER INSERT ON steps WHEN NEW.status = 'Running' BEGIN",
        )
    ],
)
async def late_skip_of_a_new_key_is_not_indexed(url: str) -> None:
    """The reason of a key that is first stored as skipped after its run was indexed is not searched."""
    async with open_store(url) as store:
        run_id = await ended_run(store)
        await store.cleanup(EARLIEST)
        await store.record_skipped_step(run_id, "charge", "http", "declined")
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "AFTER UPDATE OF status ON runs WHEN NEW.status <> 'Running' BEGIN",
            "AFTER UPDATE OF status ON runs WHEN NEW.status <> 'Running'\n"
            "        AND NOT EXISTS (SELECT 1 FROM run_texts WHERE run_id = NEW.run_id) BEGIN",
        )
    ],
)
async def retried_run_is_indexed_once(url: str) -> None:
    """A run that was retried keeps the index entry of its first end."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.cleanup(EARLIEST)
        await store.retry_step(run_id, "charge")
        await new_step(store, run_id, output_json="receipt")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        assert await _is_found(store, "receipt")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[(SEARCH, "for statement in (READ_STEPS, READ_ATTEMPTS):", "for statement in (READ_STEPS,):")],
)
async def earlier_attempts_are_not_indexed(url: str) -> None:
    """The index has the newest attempts only."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED, error_message="declined")
        await new_step(store, run_id)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await store.cleanup(EARLIEST)
        assert await _is_found(store, "declined")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "SELECT flow_name, trigger_key, status, job_id FROM runs",
            "SELECT flow_name, trigger_key, status FROM runs",
        )
    ],
)
async def job_ids_are_not_indexed(url: str) -> None:
    """The index lacks the job_id of a run."""
    async with open_store(url) as store:
        await ended_run(store, job_id="batch-17")
        await store.cleanup(EARLIEST)
        assert await _is_found(store, "batch-17")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (SEARCH, 'return fold_ascii("\\n".join(', 'return ("\\n".join('),
        (
            SEARCH,
            "for text in texts if text is not None))",
            "for text in texts if text is not None)).lower()",
        ),
    ],
)
async def index_folds_other_letters(url: str) -> None:
    """The index folds the case of all letters, not of ASCII letters only, so a text like É is not found."""
    async with open_store(url) as store:
        await ended_run(store, flow_name="École")
        await store.cleanup(EARLIEST)
        assert await _is_found(store, "École")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2", "CON-2"),
    changes=[(SEARCH, "        DELETE FROM unsearched WHERE run_id = OLD.run_id;\n", "")],
)
async def deleted_run_waits_for_indexing(url: str) -> None:
    """A deleted run stays in the list of runs to index, on which the next indexing fails."""
    async with open_store(url) as store:
        run_id = await ended_run(store)
        (run,) = await store.get_runs()
        try:
            await store.cleanup(run.started_at.replace(year=run.started_at.year + 1, day=1))
        except TypeError:
            raise AssertionError("cleanup raises an error of its own code") from None
        assert await store.get_run_status(run_id) is None


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[(SEARCH, "    UNION ALL SELECT run_id FROM unsearched\n", "")],
)
async def ended_run_is_not_found_until_it_is_indexed(url: str) -> None:
    """A search overlooks the runs that have ended and wait for indexing."""
    async with open_store(url) as store:
        await ended_run(store)
        assert await _is_found(store, "orders")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[(SEARCH, "    UNION ALL SELECT run_id FROM runs WHERE status = 'Running'\n", "")],
)
async def reopened_run_is_searched_in_its_old_text(url: str) -> None:
    """A search reads a reopened run as it was when it had ended."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.cleanup(EARLIEST)
        await store.retry_step(run_id, "charge")
        await new_step(store, run_id, output_json="receipt")
        assert await _is_found(store, "receipt")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "substr(error_message, 1, :max_length), substr(output_json, 1, :max_length) FROM steps",
            "substr(error_message, 1, 1000), substr(output_json, 1, 1000) FROM steps",
        )
    ],
)
async def index_has_the_first_thousand_characters(url: str) -> None:
    """The index has the first 1,000 characters of errors and outputs only."""
    async with open_store(url) as store:
        run_id = await new_run(store, run_id=UUID(int=1))
        await new_step(store, run_id, output_json="x" * 1000 + "receipt")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await store.cleanup(EARLIEST)
        assert await _is_found(store, "receipt")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "NOT EXISTS (SELECT 1 FROM run_texts) AND EXISTS",
            "NOT EXISTS (SELECT 1 FROM unsearched) AND EXISTS",
        )
    ],
)
async def index_is_emptied_when_it_is_complete(url: str) -> None:
    """cleanup empties the index whenever no run waits for indexing."""
    async with open_store(url) as store:
        await ended_run(store)
        await store.cleanup(EARLIEST)
        assert await _is_found(store, "orders")


@source_mutant(
    "sqlite",
    kind="index",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "    for (run_id,) in db.execute(FIND_UNSEARCHED, (INDEX_BATCH,)).fetchall():\n",
            "    found = db.execute(FIND_UNSEARCHED, (INDEX_BATCH,)).fetchall()\n"
            "    db.executemany(DROP_UNSEARCHED, found)\n"
            "    for (run_id,) in found:\n",
        )
    ],
)
async def slow_indexing_forgets_runs(url: str) -> None:
    """Indexing that stops at its time limit drops the runs that it had taken but not indexed."""
    async with open_store(url) as store:
        for number in range(40):
            run_id = await new_run(store)
            output = " ".join(f"{number}-{word}" for word in range(6000)) + "receipt"
            await new_step(store, run_id, output_json=output)
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await store.cleanup(EARLIEST)
        assert (await store.get_runs_page(search="receipt")).total_count == 40


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-2",),
    changes=[
        (
            SEARCH,
            "instr(lower(status), :needle) OR instr(lower(job_id), :needle)",
            "instr(lower(status || ' ' || job_id), :needle)",
        )
    ],
)
async def status_of_a_run_without_job_id_is_not_searched(url: str) -> None:
    """A search for a status overlooks runs without a job_id, because NULL absorbs the text."""
    async with open_store(url) as store:
        await new_run(store)
        assert await _is_found(store, "running")
