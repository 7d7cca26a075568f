"""Mutants of lists, pages, searches and statistics."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, timedelta
from math import ceil
from typing import Any

from flowstore_core import RunPage, RunStatus, StepStatus
from flowstore_memory.attempts import step_record
from flowstore_sqlite.codecs import from_us
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


@mutant("postgresql", "QRY-1")
class RunsOrderedOnlyByStart(PatchedPostgres):
    """Leaves the order of runs with equal started_at undefined."""

    patch_sql = SqlPatch(
        (
            r"ORDER BY ([ri])\.started_at DESC, \1\.run_id DESC",
            r"ORDER BY \1.started_at DESC, md5(\1.run_id::text)",
        )
    )


@mutant("sqlite", "QRY-1")
class RunsTiesAscending(PatchedSqlite):
    """Orders runs with equal started_at by ascending run_id."""

    patch_sql = SqlPatch((r"ORDER BY started_at DESC, run_id DESC", "ORDER BY started_at DESC, run_id"))


@mutant("memory", "QRY-1")
class KeysInCaseFoldedOrder:
    """Orders step keys case-insensitively instead of by code point."""

    async def get_dispatches(self, **given: Any) -> Any:
        return tuple(sorted(await super().get_dispatches(**given), key=lambda one: one.step_key.lower()))

    async def get_step_claims(self, **given: Any) -> Any:
        return tuple(sorted(await super().get_step_claims(**given), key=lambda one: one.step_key.lower()))

    async def get_waiters(self, **given: Any) -> Any:
        return tuple(sorted(await super().get_waiters(**given), key=lambda one: one.step_key.lower()))


class _CustomSearch:
    """Searches with its own rule."""

    def rule(self, search: str) -> Callable[[str], bool]:
        raise NotImplementedError

    async def get_runs_page(self, **given: Any) -> Any:
        if given["search"] is None:
            return await super().get_runs_page(**given)  # type: ignore[misc]
        every = await super().get_runs_page(  # type: ignore[misc]
            **{**given, "search": None, "skip": 0, "take": 100_000}
        )
        matches = self.rule(given["search"])
        found = []
        for run in every.runs:
            detail = await super().get_run_detail(run_id=run.run_id)  # type: ignore[misc]
            texts = [str(run.run_id), run.flow_name, run.trigger_key, run.status, run.job_id]
            for step in detail.steps:
                texts += [step.step_key, step.error_message, step.output_json]
                for attempt in step.attempts:
                    texts += [attempt.error_message, attempt.output_json]
            if any(text is not None and matches(text) for text in texts):
                found.append(run)
        page = tuple(found[given["skip"] : given["skip"] + given["take"]])
        return RunPage(runs=page, total_count=len(found))


@mutant("memory", "QRY-2")
class SearchUsesWildcards(_CustomSearch):
    """Treats % and _ as wildcards, as LIKE does."""

    def rule(self, search: str) -> Callable[[str], bool]:
        parts = [{"%": ".*", "_": "."}.get(letter, re.escape(letter)) for letter in search]
        found = re.compile("".join(parts), re.DOTALL | re.IGNORECASE | re.ASCII)
        return lambda text: found.search(text) is not None


@mutant("memory", "QRY-2")
class SearchCaseSensitive(_CustomSearch):
    """Compares ASCII letters case-sensitively."""

    def rule(self, search: str) -> Callable[[str], bool]:
        return lambda text: search in text


@mutant("memory", "QRY-2")
class SearchFoldsUnicode(_CustomSearch):
    """Folds letters outside ASCII too."""

    def rule(self, search: str) -> Callable[[str], bool]:
        return lambda text: search.casefold() in text.casefold()


@mutant("sqlite", "QRY-2")
class SearchOmitsOldAttempts(PatchedSqlite):
    """Searches only the newest attempt of each step."""

    patch_sql = SqlPatch(
        (
            r"SELECT 1 FROM attempts JOIN steps",
            "SELECT 1 FROM (SELECT * FROM attempts WHERE FALSE) attempts JOIN steps",
        )
    )


@mutant("postgresql", "QRY-2")
class SearchOmitsOutputs(PatchedPostgres):
    """Does not search outputs."""

    patch_sql = SqlPatch(
        (r"lower\(left\(([sa])\.output_json, ", r"lower(left(NULLIF(\1.output_json, \1.output_json), ")
    )


@mutant("postgresql", "QRY-3")
class TotalIgnoresFilter(PatchedPostgres):
    """Counts all runs instead of the matching runs."""

    patch_sql = SqlPatch(
        (
            r"(FROM \{schema\}\.run_(?:counts|changes)) WHERE flow_id = \$\d+",
            r"\1 WHERE true",
        )
    )


@mutant("sqlite", "QRY-3", concurrent=True)
class TotalFromAnotherSnapshot:
    """Reads the page, and the total in a later snapshot."""

    async def get_runs_page(self, **given: Any) -> Any:
        page = await super().get_runs_page(**given)
        total = (await super().get_runs_page(**{**given, "skip": 0, "take": 0})).total_count
        return RunPage(runs=page.runs, total_count=total)


class _Torn:
    async def get_run_detail(self, **given: Any) -> Any:
        run = await super().get_run_detail(**given)  # type: ignore[misc]
        if run is None:
            return None
        later = await super().get_run_detail(**given)  # type: ignore[misc]
        steps = () if later is None else later.steps
        return replace(run, steps=steps)


@mutant("sqlite", "QRY-3", concurrent=True)
class DetailFromTwoSnapshots(_Torn):
    """Reads the run, and its steps in a later snapshot."""


@mutant("postgresql", "QRY-3", concurrent=True)
class DetailFromTwoStatements:
    """Reads the steps, and their attempts in a later statement."""

    async def get_run_detail(self, **given: Any) -> Any:
        run = await super().get_run_detail(**given)
        later = await super().get_run_detail(**given)
        if run is None or later is None:
            return None
        attempts = {step.step_key: step.attempts for step in later.steps}
        steps = tuple(
            replace(step, attempts=attempts.get(step.step_key, step.attempts)) for step in run.steps
        )
        return replace(run, steps=steps)


@mutant("postgresql", "QRY-3", concurrent=True)
class StepFromTwoStatements:
    """Reads a step, and its attempts in a later statement."""

    async def get_step(self, **given: Any) -> Any:
        step = await super().get_step(**given)
        later = await super().get_step(**given)
        if step is None or later is None:
            return None
        return replace(step, attempts=later.attempts)


@mutant("memory", "QRY-3")
class ResetStepsAreRead:
    """get_step returns a step that retry_step has reset, as its last attempt left it."""

    async def get_step(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if run is not None and step is not None and step.status is None and step.attempt:
            return step_record(run, given["step_key"], step, StepStatus.SKIPPED)
        return await super().get_step(**given)


@mutant("memory", "QRY-4")
class StatisticsOfAllTime:
    """Counts completions of every day."""

    async def get_statistics(self, **given: Any) -> Any:
        statistics = await super().get_statistics(**given)
        statuses = [run.status for run in self._runs.values()]
        return replace(
            statistics,
            completed_today=statuses.count(RunStatus.SUCCEEDED),
            failed_today=statuses.count(RunStatus.FAILED),
        )


@mutant("sqlite", "QRY-4")
class StatisticsOfLocalDay:
    """Uses the day of its local time zone."""

    async def get_statistics(self, **given: Any) -> Any:
        now = given["as_of"] or from_us(self._database.now())
        local_day = now - timedelta(hours=9, minutes=30)
        return await super().get_statistics(as_of=local_day)


@mutant("postgresql", "QRY-4")
class StatisticsCountRuns(PatchedPostgres):
    """Counts runs instead of flows."""

    patch_sql = SqlPatch(
        (r"SELECT count\(\*\) FROM flows WHERE runs > 0", "SELECT count(*) FROM {schema}.runs")
    )


@mutant("memory", "QRY-5")
class PercentilesByNearestRank:
    """Uses the nearest rank instead of interpolating."""

    async def get_run_timeseries(self, **given: Any) -> Any:
        buckets = await super().get_run_timeseries(**given)
        width = timedelta(hours=1) if given["granularity"] == "hour" else timedelta(days=1)
        found = []
        for bucket in buckets:
            durations = sorted(
                (run.completed_at - run.started_at) / timedelta(milliseconds=1)
                for run in self._runs.values()
                if run.completed_at is not None
                and bucket.timestamp <= run.started_at < bucket.timestamp + width
                and given["flow_id"] in (None, run.flow_id)
            )
            if durations:
                p50, p95 = (durations[ceil(part * len(durations)) - 1] for part in (0.5, 0.95))
                bucket = replace(bucket, p50_duration_ms=p50, p95_duration_ms=p95)
            found.append(bucket)
        return tuple(found)


@mutant("sqlite", "QRY-5")
class EmptyBucketsOmitted:
    """Omits buckets without runs."""

    async def get_run_timeseries(self, **given: Any) -> Any:
        return tuple(bucket for bucket in await super().get_run_timeseries(**given) if bucket.total)


@mutant("memory", "QRY-5")
class BucketsByCompletion:
    """Counts runs in the bucket of their completion."""

    async def get_run_timeseries(self, **given: Any) -> Any:
        starts = {}
        for run in self._runs.values():
            if run.completed_at is not None:
                starts[run], run.started_at = run.started_at, run.completed_at
        try:
            return await super().get_run_timeseries(**given)
        finally:
            for run, start in starts.items():
                run.started_at = start


@mutant("memory", "QRY-5")
class BucketsOfLocalTime:
    """Treats the local time of a start as UTC."""

    async def get_run_timeseries(self, **given: Any) -> Any:
        starts = {run: run.started_at for run in self._runs.values()}
        for run in starts:
            run.started_at = run.started_at.astimezone().replace(tzinfo=UTC)
        try:
            return await super().get_run_timeseries(**given)
        finally:
            for run, start in starts.items():
                run.started_at = start


@mutant("postgresql", "QRY-5")
class DaysOfOtherTimeZone(PatchedPostgres):
    """Splits days at midnight of another time zone."""

    patch_sql = SqlPatch(
        (
            r"date_bin\(\$1::interval, r\.started_at, \$2\)",
            "date_bin($1::interval, r.started_at - interval '90 minutes', $2)",
        )
    )


@mutant("sqlite", "QRY-6")
class ActiveOldestFirst:
    """Lists active runs from oldest to newest."""

    async def get_active_runs(self, **given: Any) -> Any:
        found = await super().get_active_runs(take=None)
        return tuple(reversed(found))[: given["take"]]


@mutant("memory", "QRY-6")
class DerivedOfAllGenerations:
    """Lists derived runs of every generation."""

    async def get_derived_runs(self, **given: Any) -> Any:
        sources = {given["source_run_id"]}
        while more := {r.run_id for r in self._runs.values() if r.source_run_id in sources} - sources:
            sources |= more
        found = await super().get_runs(flow_id=None, after=None, skip=0, take=1000)
        return tuple(run for run in found if run.source_run_id in sources)[: given["take"]]
