"""Mutants whose reads are wrong only after a change: caches, lazy indexes, orders and joined texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from posixpath import normpath
from typing import Any, TypeVar

from flowstore_core import RunPage, RunStatus, StepStatus
from flowstore_core.operations import OPERATIONS
from tests.mutants import mutant

StoreClass = TypeVar("StoreClass", bound=type)


def caches(
    *names: str, keeps: Callable[[Any], bool] = lambda result: True
) -> Callable[[StoreClass], StoreClass]:
    """A decorator that caches results of some reads, by their arguments, until the same store writes."""

    def add(cls: StoreClass) -> StoreClass:
        def reading(name: str) -> Any:
            async def read(self: Any, **given: Any) -> Any:
                cached = vars(self).setdefault("_cached", {})
                key = (name, repr(given))
                if key in cached:
                    return cached[key]
                result = await getattr(super(cls, self), name)(**given)
                if keeps(result):
                    cached[key] = result
                return result

            return read

        def writing(name: str) -> Any:
            async def write(self: Any, **given: Any) -> Any:
                try:
                    return await getattr(super(cls, self), name)(**given)
                finally:
                    vars(self).pop("_cached", None)

            return write

        for operation in OPERATIONS.values():
            if operation.name in names:
                setattr(cls, operation.name, reading(operation.name))
            elif operation.writes:
                setattr(cls, operation.name, writing(operation.name))
        return cls

    return add


@mutant("memory", "QRY-5")
@caches("get_run_timeseries", keeps=lambda buckets: any(bucket.total for bucket in buckets))
class SeriesCachedUntilOwnWrite:
    """Caches timeseries, and invalidates them only by its own writes."""


@mutant("memory", "QRY-5")
class SeriesCachedUntilNextRun:
    """Caches timeseries until a run is started or deleted; their counts by status stay."""

    def begin(self) -> None:
        self._cached: dict[str, Any] = {}

    async def get_run_timeseries(self, **given: Any) -> Any:
        key = f"{len(self._runs)} {given!r}"
        if key not in self._cached:
            self._cached[key] = await super().get_run_timeseries(**given)
        return self._cached[key]


@mutant("sqlite", "QRY-4")
@caches("get_statistics")
class StatisticsCachedUntilOwnWrite:
    """Caches statistics, and invalidates them only by its own writes."""


@mutant("sqlite", "CLM-2")
@caches("get_run_status", keeps=lambda status: status is not None and status is not RunStatus.RUNNING)
class TerminalStatusCached:
    """Caches terminal statuses until its own next write: another store may reopen the run."""


@mutant("postgresql", "CLM-2")
@caches("get_run", keeps=lambda run: run is not None and run.completed_at is not None)
class TerminalRunCached:
    """Caches the records of terminal runs until its own next write: another store may reopen the run."""


@mutant("postgresql", "CLM-2")
@caches("find_run_id_by_idempotency_key", keeps=lambda run_id: run_id is not None)
class RegisteredKeysCached:
    """Caches the runs of idempotency keys until its own next write: another store may delete them."""


@mutant("memory", "CLM-2")
@caches("get_run_detail", "get_run_status", "get_run_control", keeps=lambda result: result is None)
class AbsenceCached:
    """Caches that a run is not stored until its own next write: another store may start it."""


@mutant("memory", "QRY-6")
@caches("get_derived_runs")
class DerivedRunsCached:
    """Caches derived runs until its own next write."""


@mutant("sqlite", "QRY-2")
class IndexMissesLateCompletions:
    """Does not index a run again when one of its steps is completed after it."""

    async def opened(self: Any) -> None:
        await self._database.write(lambda db, now: db.execute("DROP TRIGGER IF EXISTS search_closed"))


@mutant("postgresql", "QRY-2")
class IndexMissesLateSkips:
    """Does not index a run again when a step is skipped after it."""

    async def opened(self: Any) -> None:
        async def drop(transaction: Any) -> None:
            await transaction.execute("DROP TRIGGER IF EXISTS search_skipped ON {schema}.steps")

        await self._database.transaction("drop", drop)


@mutant("sqlite", "QRY-2")
class IndexMissesReopenedRuns:
    """Indexes each run once, although a retry may reopen it and change its texts."""

    async def opened(self: Any) -> None:
        def patch(db: Any, now: int) -> None:
            db.execute("DROP TRIGGER IF EXISTS search_ended")
            db.execute(
                """
                CREATE TRIGGER search_ended AFTER UPDATE OF status ON runs
                WHEN NEW.status <> 'Running'
                AND NOT EXISTS (SELECT 1 FROM run_texts WHERE run_id = NEW.run_id) BEGIN
                    INSERT INTO unsearched VALUES (NEW.run_id) ON CONFLICT DO NOTHING;
                END
                """
            )

        await self._database.write(patch)


@mutant("memory", "QRY-2")
class SearchInNewestThousand:
    """Searches the newest 1,000 runs only."""

    async def get_runs_page(self, **given: Any) -> Any:
        page = await super().get_runs_page(**given)
        if given["search"] is None:
            return page
        every = await super().get_runs_page(**{**given, "skip": 0, "take": 100_000})
        newest = sorted(self._runs.values(), key=lambda run: (run.started_at, run.run_id), reverse=True)
        known = {run.run_id for run in newest[:1000]}
        found = [run for run in every.runs if run.run_id in known]
        return RunPage(
            runs=tuple(found[given["skip"] : given["skip"] + given["take"]]), total_count=len(found)
        )


@mutant("memory", "QRY-2")
class SearchInJoinedText:
    """Searches one text in which the fields of a run are lines, besides the single fields."""

    async def get_runs_page(self, **given: Any) -> Any:
        if "\n" not in (given["search"] or ""):
            return await super().get_runs_page(**given)
        whole = {**given, "skip": 0, "take": 100_000}
        found = (await super().get_runs_page(**whole)).runs
        others = (await super().get_runs_page(**{**whole, "search": None})).runs
        for run in others:
            text = "\n".join((str(run.run_id), run.flow_name, run.trigger_key, run.status))
            if given["search"].lower() in text.lower() and run not in found:
                found = (*found, run)
        return RunPage(runs=found[given["skip"] :][: given["take"]], total_count=len(found))


@mutant("memory", "QRY-6")
class DerivedLimitedBeforeSorting:
    """Takes the most recently started derived runs in the order of the calls, and sorts these."""

    async def get_derived_runs(self, **given: Any) -> Any:
        every = await super().get_derived_runs(**{**given, "take": None})
        order = list(self._runs)
        newest = sorted(every, key=lambda run: order.index(run.run_id.int), reverse=True)[: given["take"]]
        return tuple(run for run in every if run in newest)


def as_text(at: datetime) -> str:
    """A time as text of the shortest length, which does not sort by time: "53Z" follows "53.000001Z"."""
    return at.isoformat().replace("+00:00", "Z")


@mutant("memory", "QRY-1")
class RunsOrderedAsText:
    """Orders runs by the text of their start."""

    async def get_runs(self, **given: Any) -> Any:
        whole = {"skip": 0, "take": 100_000}
        every = await super().get_runs(**{**given, **whole, "after": None})
        ordered = sorted(every, key=_text_position, reverse=True)
        if (after := given["after"]) is not None:
            ordered = [run for run in ordered if _text_position(run) < _text_position(after)]
        return tuple(ordered[given["skip"] :][: given["take"]])


def _text_position(run: Any) -> tuple[str, bytes]:
    return (as_text(run.started_at), run.run_id.bytes)


@mutant("memory", "CTL-3")
class DeadlinesOrderedAsText:
    """Orders runs to stop by the text of their deadline."""

    async def get_runs_to_stop(self, **given: Any) -> Any:
        every = await super().get_runs_to_stop(**{**given, "take": 100_000})
        deadlines = {}
        for run in every:
            control = await super().get_run_control(run_id=run.run_id)
            deadlines[run.run_id] = "~" if control.timeout_at is None else as_text(control.timeout_at)
        ordered = sorted(every, key=lambda run: (deadlines[run.run_id], run.run_id.bytes))
        return tuple(ordered[: given["take"]])


@mutant("memory", "STP-8")
class StallsOrderedAsText:
    """Orders stalled steps by the text of the time at which they stalled."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        every = await super().get_stalled_steps(**{**given, "take": 100_000})
        ordered = sorted(every, key=lambda one: (as_text(one.since), one.run_id.bytes, one.step_key))
        return tuple(ordered[: given["take"]])


@mutant("memory", "QRY-3")
class StepsOrderedAsText:
    """Orders the steps of a run by the text of their start."""

    async def get_run_detail(self, **given: Any) -> Any:
        run = await super().get_run_detail(**given)
        if run is None:
            return None
        steps = sorted(run.steps, key=lambda step: (as_text(step.started_at), step.step_key))
        return replace(run, steps=tuple(steps))


@mutant("memory", "SIG-2")
class WaitersOrderedAsText:
    """Delivers to the waiter that is the oldest by the text of created_at."""

    async def deliver_signal(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        created = {} if run is None else {waiter: waiter.created_at for waiter in run.waiters.values()}
        texts = sorted({as_text(at) for at in created.values()})
        for waiter, at in created.items():
            waiter.created_at = datetime.min.replace(tzinfo=UTC) + timedelta(
                microseconds=texts.index(as_text(at))
            )
        try:
            return await super().deliver_signal(**given)
        finally:
            for waiter, at in created.items():
                waiter.created_at = at


@mutant("memory", "RUN-2")
class ExpectedComparedAsText:
    """Compares the expected statuses with the actual ones as one joined text."""

    async def complete_run(self, **given: Any) -> bool:
        expected = given["expected"]
        if expected is not None:
            actual = await super().get_step_statuses(run_id=given["run_id"])
            if _joined(actual) == _joined(expected):
                given = {**given, "expected": dict(actual)}
        return bool(await super().complete_run(**given))


def _joined(statuses: Any) -> str:
    return ",".join(f"{key}:{status}" for key, status in sorted(statuses.items()))


@mutant("memory", "IDM-1")
class ScopeJoined:
    """Joins trigger key and idempotency key with a bar."""

    def _joined(self, given: Any) -> Any:
        scope = f"{given['trigger_key']}|{given['idempotency_key']}"
        return {**given, "trigger_key": "", "idempotency_key": scope}

    async def find_run_id_by_idempotency_key(self, **given: Any) -> Any:
        return await super().find_run_id_by_idempotency_key(**self._joined(given))

    async def try_register_idempotency_key(self, **given: Any) -> Any:
        return await super().try_register_idempotency_key(**self._joined(given))

    async def trigger_run(self, **given: Any) -> Any:
        # The record of the run shows the trigger key.
        if given["idempotency_key"] is not None:
            scope = {name: given[name] for name in ("flow_id", "trigger_key", "idempotency_key", "run_id")}
            await self.try_register_idempotency_key(**scope)
        return await super().trigger_run(**given)


@mutant("memory", "STP-6")
class ResetJoined:
    """Sends the keys of reset as one text, separated by commas."""

    async def retry_step(self, **given: Any) -> None:
        reset = ",".join(given["reset"])
        await super().retry_step(**{**given, "reset": reset.split(",") if reset else ()})


@mutant("memory", "INP-2")
class EmptyReasonIsNone:
    """Compares the reason of a repeated skip as if an empty one were none."""

    async def record_skipped_step(self, **given: Any) -> None:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if step is not None and step.status is StepStatus.SKIPPED and not step.error_message:
            given = {**given, "reason": given["reason"] or step.error_message}
        await super().record_skipped_step(**given)


@mutant("memory", "INP-1")
class OutputKeysAsPaths:
    """Treats the key of an output as a path: "a//b" and "a/b" name one file."""

    async def save_output(self, **given: Any) -> None:
        await super().save_output(**{**given, "key": normpath(given["key"])})

    async def get_output(self, **given: Any) -> Any:
        return await super().get_output(**{**given, "key": normpath(given["key"])})


@mutant("memory", "INP-1")
class OutcomeComparedAsText:
    """Compares output and error of a repeated completion as one text with a bar between them."""

    async def record_step_complete(self, **given: Any) -> None:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if step is not None and step.completed_at is not None:
            texts = {"output_json": step.output_json, "error_message": step.error_message}
            if _outcome(texts) == _outcome(given):
                given = {**given, **texts}
        await super().record_step_complete(**given)


def _outcome(texts: Any) -> str:
    return "|".join(texts[name] for name in ("output_json", "error_message") if texts[name] is not None)
