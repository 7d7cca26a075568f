"""``flowstore copy`` from SQLite to PostgreSQL and back, killed in the middle of both and resumed.

Fills a store with runs in every kind of state, copies it twice, and compares the last copy with the first
store: every list, get_run_detail and export_run of every run, and every other read of each tenth run, or of
those that ``--every`` selects. The figures are runs per second, verification included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from benchmarks.cluster import cluster
from benchmarks.options import say
from flowstore_core import (
    FlowRunRecord,
    FlowStore,
    RunArchive,
    RunStatus,
    StepRequest,
    StepStatus,
    new_run_id,
    open_store,
)
from flowstore_core.transfer import is_same_run
from flowstore_core.validated_store import ValidatedStore

FLOWS = tuple(uuid5(UUID(int=0), f"flow {number}") for number in range(7))
AT_ONCE = 200
COMMAND = "flowstore_cli.main"
MODELS = 1_000
PAGE = 1000
LATER = datetime(2099, 1, 1, tzinfo=UTC)
LEASE = timedelta(days=1)

Shape = Callable[[FlowStore, UUID, UUID], Awaitable[None]]


class DifferenceError(Exception):
    """The last store differs from the first one."""


# Runs


async def _succeeded(store: FlowStore, run_id: UUID, flow_id: UUID) -> None:
    """Three steps of a durable engine, with outputs and events."""
    keys = ("fetch", "charge", "ship")
    requests = [StepRequest(step_key=key, step_type="http", queue="mail") for key in keys]
    await store.trigger_run(
        flow_id, "orders", run_id, "manual", idempotency_key=f"{run_id}", dispatch=requests
    )
    for key in keys:
        await store.try_claim_step(run_id, key, owner=f"worker of {key}", lease=LEASE)
        attempt = await store.record_step_start(run_id, key, "http", input_json='{"id":1}')
        await store.advance_run(
            run_id,
            key,
            StepStatus.SUCCEEDED,
            attempt=attempt,
            output_json='{"ok":true}',
            complete_as="Succeeded",
        )
    await store.save_output(run_id, "receipt", '{"number":1}')
    await store.append_event(run_id, "shipped", step_key="ship")


async def _failed(store: FlowStore, run_id: UUID, flow_id: UUID) -> None:
    """A step that failed twice, one that was skipped for it, and a deadline."""
    await store.configure_run(run_id, flow_id, "cron", timeout_at=LATER)
    await store.start_run(flow_id, "orders", run_id, "cron", trigger_data="é", source_run_id=new_run_id())
    for number in (1, 2):
        await store.record_step_start(run_id, "charge", "http", job_id=f"job {number}")
        await store.record_step_complete(
            run_id, "charge", StepStatus.FAILED, error_message=f"refused {number}"
        )
    await store.record_skipped_step(run_id, "ship", "http", "charge failed", owner="engine")
    await store.complete_run(run_id, RunStatus.FAILED)


async def _retried(store: FlowStore, run_id: UUID, flow_id: UUID) -> None:
    """Reopened, with a reset step, a step that is tried again, and one that is polled."""
    await _failed(store, run_id, flow_id)
    await store.retry_step(run_id, "charge", reset=["ship"])
    await store.record_step_start(run_id, "poll", "http")
    await store.reschedule_step(run_id, "poll", attempt=1, due_at=LATER)
    await store.record_step_start(run_id, "tried", "http")
    await store.reschedule_step(run_id, "tried", attempt=1, error_message="not yet")


async def _waiting(store: FlowStore, run_id: UUID, flow_id: UUID) -> None:
    """Waits for signals, of which one came."""
    await store.start_run(flow_id, "approvals", run_id, "manual")
    for key in ("approve", "approve too"):
        await store.register_waiter(run_id, key, "approved", expires_at=LATER)
        await store.try_record_dispatch(run_id, key, queue="mail", step_type="http", priority=3)
    await store.deliver_signal(run_id, "approved", '{"by":"me"}', delivery_id="delivery 1")
    await store.remove_waiter(run_id, "approve")


async def _held(store: FlowStore, run_id: UUID, flow_id: UUID) -> None:
    """Claimed by workers of every kind, and cancelled meanwhile."""
    await store.start_run(flow_id, "orders", run_id, "manual")
    await store.try_claim_step(run_id, "leased", owner="worker", lease=LEASE)
    await store.record_step_start(run_id, "leased", "http", owner="worker")
    await store.try_claim_step(run_id, "held")
    await store.try_record_dispatch(run_id, "held")
    await store.annotate_dispatch(run_id, "held", "job 9")
    await store.request_cancel(run_id, "enough")
    await store.mark_timed_out(run_id, "late")


SHAPES: tuple[Shape, ...] = (*[_succeeded] * 6, _failed, _retried, _waiting, _held)


async def fill(url: str, runs: int) -> None:
    """Create a store with this number of runs of every shape.

    The operations of the store make the first MODELS of them. The others are imported copies of these, with
    other ids, keys and times.
    """
    models = [new_run_id() for _ in range(min(runs, MODELS))]
    async with open_store(url) as store:
        await _each(
            range(len(models)), lambda n: SHAPES[n % len(SHAPES)](store, models[n], FLOWS[n % len(FLOWS)])
        )
        archives = [await store.export_run(run_id) for run_id in models]
        copies = runs - len(models)
        await _each(range(copies), lambda n: _import_copy(store, archives[n % len(archives)], n))


async def _each(numbers: range, work: Callable[[int], Awaitable[None]]) -> None:
    """Await ``work`` of each number, a bounded number at a time."""
    for first in range(0, len(numbers), AT_ONCE):
        await asyncio.gather(*(work(number) for number in numbers[first : first + AT_ONCE]))


async def _import_copy(store: FlowStore, archive: RunArchive | None, number: int) -> None:
    assert archive is not None
    old, new = archive.run_id, new_run_id()
    # Also replaces the id in the idempotency key.
    copied = RunArchive.from_json(archive.to_json().replace(str(old), str(new)))
    started_at = archive.run.started_at - timedelta(seconds=number + 1)
    await store.import_run(replace(copied, run=replace(copied.run, started_at=started_at)))


# Copies


async def copy(source: str, target: str, *, kill_after: int | None = None) -> tuple[float, float]:
    """Run ``flowstore copy`` in a process; returns its seconds, and those of its CPU time.

    With ``kill_after`` it gets SIGKILL when it has stored this number of runs, while more are on their way.
    """
    command = ["-m", COMMAND]
    if kill_after is not None:
        command = ["-m", "benchmarks.transfer", "--kill-after", f"{kill_after}"]
    began, used = time.perf_counter(), _cpu_seconds()
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "copy", source, target, "--engines-stopped"
    )
    code = await process.wait()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        raise DifferenceError(f"flowstore copy ended with {code}")
    return time.perf_counter() - began, _cpu_seconds() - used


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _copy_until_killed(kill_after: int, arguments: Sequence[str]) -> None:
    """Run the command line in this process, which kills itself after a number of imports."""
    import_run = ValidatedStore.import_run
    left = kill_after

    async def counted(self: ValidatedStore, archive: RunArchive) -> bool:
        nonlocal left
        imported = await import_run(self, archive)
        left -= imported
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return imported

    ValidatedStore.import_run = counted  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    runpy.run_module(COMMAND, run_name="__main__")


# Comparison


async def compare_runs(first: FlowStore, last: FlowStore, runs: int, every: int) -> int:
    """Compare each run in two stores; returns the number of reads.

    Makes every read of each run whose number is divisible by ``every``, and of the others those that show
    most. The claims on open steps have ended in the last store only.
    """
    reads = 0
    async for pages in _pages(first, last):
        if pages[0] != pages[1]:
            raise DifferenceError(f"get_runs: {pages[0][:1]} ... and {pages[1][:1]} ...")
        for start in range(0, len(pages[0]), AT_ONCE):
            some = pages[0][start : start + AT_ONCE]
            whole = [(start + number) % every == 0 for number in range(len(some))]
            found = (_compare_run(first, last, run, whole=one) for run, one in zip(some, whole, strict=True))
            reads += sum(await asyncio.gather(*found))
        runs -= len(pages[0])
    if runs:
        raise DifferenceError(f"{runs:,} runs are missing in both stores")
    return reads


async def _pages(*stores: FlowStore) -> AsyncIterator[list[Sequence[FlowRunRecord]]]:
    position = None
    while True:
        pages = [await store.get_runs(after=position, take=PAGE) for store in stores]
        if not any(pages):
            return
        yield pages
        position = pages[0][-1].position


OF_RUN = (
    "get_run_detail",
    "get_run",
    "get_run_status",
    "get_step_statuses",
    "get_dispatches",
    "get_dispatched_step_keys",
    "get_run_control",
    "get_derived_runs",
    "get_waiters",
    "get_outputs",
    "get_run_events",
)


async def _compare_run(first: FlowStore, last: FlowStore, run: FlowRunRecord, *, whole: bool) -> int:
    run_id = run.run_id
    for name in OF_RUN if whole else OF_RUN[:1]:
        answers = [await getattr(store, name)(run_id) for store in (first, last)]
        _expect(f"{name} of {run_id}", *answers)
    exports = [await store.export_run(run_id) for store in (first, last)]
    if exports[0] is None or exports[1] is None or not is_same_run(exports[0], exports[1]):
        raise DifferenceError(f"export_run of {run_id}")
    if not whole:
        return 2
    for key in exports[0].idempotency_keys:
        scope = (key.flow_id, key.trigger_key, key.idempotency_key)
        for store in (first, last):
            _expect(
                f"the run of a key of {run_id}", run_id, await store.find_run_id_by_idempotency_key(*scope)
            )
    wanted = tuple(step.claim for step in exports[1].steps if step.claim is not None)
    _expect(f"get_step_claims of {run_id}", wanted, await last.get_step_claims(run_id))
    _expect(f"get_claimed_step_keys of {run_id}", frozenset(), await last.get_claimed_step_keys(run_id))
    return len(OF_RUN) + 3


async def compare_lists(first: FlowStore, last: FlowStore, *, of_claims: bool) -> int:
    """Compare lists and sums of all runs; ``of_claims`` includes those that depend on claims."""
    now = datetime.now(UTC)
    queries: list[tuple[str, dict[str, Any]]] = [
        ("get_active_runs", {}),
        ("get_runs_to_stop", {"as_of": LATER, "take": 1000}),
        ("get_statistics", {"as_of": now}),
        *(("get_runs_page", {"search": text, "take": 1000}) for text in ("refused 2", "é", "ok", "nothing")),
        *(("get_runs_page", {"status": status, "take": 1000}) for status in RunStatus),
        *(("get_runs_page", {"flow_id": flow_id, "take": 1000}) for flow_id in FLOWS),
        *(
            ("get_run_timeseries", {"granularity": unit, "since": now - timedelta(days=1), "until": now})
            for unit in ("hour", "day")
        ),
    ]
    if of_claims:
        queries += [("get_stalled_steps", {"as_of": LATER, "take": 1000}), ("get_queues", {})]
    for name, arguments in queries:
        answers = [await getattr(store, name)(**arguments) for store in (first, last)]
        _expect(f"{name}({arguments})", *answers)
    return len(queries)


def _expect(what: str, wanted: object, found: object) -> None:
    if wanted != found:
        raise DifferenceError(f"{what}: expected {wanted!r:.500}, got {found!r:.500}")


# Program


async def round_trip(source: str, between: str, target: str, runs: int, every: int = 1) -> None:
    """Fill the first store, copy it to the second and on to the third, and compare them."""
    began = time.perf_counter()
    await fill(source, runs)
    say(f"filled {source.partition(':')[0]} with {runs:,} runs in {time.perf_counter() - began:.0f} s")
    for one, other in ((source, between), (between, target)):
        killed, killed_cpu = await copy(one, other, kill_after=runs // 2)
        resumed, resumed_cpu = await copy(one, other)
        seconds, cpu = killed + resumed, killed_cpu + resumed_cpu
        say(
            f"copied from {one.partition(':')[0]} to {other.partition(':')[0]}: killed after {killed:.0f} s, "
            f"resumed and verified in {resumed:.0f} s: {runs / seconds:,.0f} runs/s, "
            f"{cpu / runs * 1e6:,.0f} microseconds of CPU per run in the client"
        )
    began = time.perf_counter()
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(url)) for url in (source, between, target)]
        reads = await compare_runs(stores[0], stores[2], runs, every)
        reads += await compare_lists(stores[0], stores[2], of_claims=False)
        reads += await compare_lists(stores[1], stores[2], of_claims=True)
    say(f"the last store equals the first: {reads:,} reads in {time.perf_counter() - began:.0f} s")


async def program(runs: int, every: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=folder) as made:
        async with cluster(Path(made)) as url:
            files = [f"sqlite:///{made}/{name}.db" for name in ("first", "last")]
            await round_trip(files[0], url, files[1], runs, every)


def main(arguments: Iterable[str]) -> None:
    given = list(arguments)
    if given[:1] == ["--kill-after"]:
        _copy_until_killed(int(given[1]), given[2:])
    options = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    options.add_argument("--runs", type=int, default=100_000, help="number of runs (100,000)")
    options.add_argument("--every", type=int, default=10, help="make every read of each Nth run (10)")
    options.add_argument("--folder", type=Path, help="folder for databases, on a real disk")
    chosen = options.parse_args(given)
    try:
        asyncio.run(program(chosen.runs, chosen.every, chosen.folder))
    except DifferenceError as error:
        sys.exit(f"benchmarks.transfer: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
