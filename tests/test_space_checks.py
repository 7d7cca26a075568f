"""The checks of key-value spaces: the space in memory passes all, and each finds faults made in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from flowstore_documents import (
    Change,
    MaybeApplied,
    NotApplied,
    Page,
    Range,
    SpaceLimits,
    TooLarge,
    Version,
    Versioned,
    View,
    space_checks,
)
from flowstore_documents.memory_space import MemoryData, MemorySpace
from flowstore_documents.space_checks import FAULT_CHECKS, SPACE_CHECKS, FaultCheck, SpaceCheck
from tests.documents_backend.plugin import LARGE, Injector

MakeSpace = Callable[[MemoryData], MemorySpace]
OpenMemory = Callable[[], AbstractAsyncContextManager[MemorySpace]]


def opener(make: MakeSpace, data: MemoryData, injector: Injector | None = None) -> OpenMemory:
    """Opens clients of the data."""

    @asynccontextmanager
    async def open_space() -> AsyncIterator[MemorySpace]:
        space = make(data)
        if injector is not None:
            injector.attach(space)
        yield space
        await space.aclose()

    return open_space


async def run_fault_check(check: FaultCheck, make: MakeSpace) -> None:
    injector = Injector("memory")
    await check(opener(make, MemoryData(), injector), injector)


def without_snapshots(data: MemoryData) -> MemorySpace:
    return MemorySpace(data, snapshots=False)


def with_large_limits(data: MemoryData) -> MemorySpace:
    return MemorySpace(data, limits=LARGE)


def without_groups(data: MemoryData) -> MemorySpace:
    return MemorySpace(data, limits=SpaceLimits(changes=1))


def with_many_writes(data: MemoryData) -> MemorySpace:
    return MemorySpace(data, limits=SpaceLimits(writes=1_100, changes=2))


def with_many_changes(data: MemoryData) -> MemorySpace:
    """A commit of so many of the largest changes is beyond the limit of its bytes."""
    return MemorySpace(data, limits=SpaceLimits(expected=100, writes=100, changes=1_000))


@pytest.mark.parametrize(
    "make",
    [
        MemorySpace,
        without_snapshots,
        with_large_limits,
        without_groups,
        with_many_writes,
        with_many_changes,
    ],
)
@pytest.mark.parametrize("check", SPACE_CHECKS, ids=lambda check: check.__name__)
async def test_the_space_in_memory(check: SpaceCheck, make: MakeSpace) -> None:
    await check(opener(make, MemoryData()))


@pytest.mark.parametrize("check", FAULT_CHECKS, ids=lambda check: check.__name__)
async def test_the_space_in_memory_with_faults(check: FaultCheck) -> None:
    await run_fault_check(check, MemorySpace)


# Faulty data


class AnyExpectation(MemoryData):
    """Applies a change if one of its expectations holds."""

    def _has(self, key: bytes, version: Version | None) -> bool:
        return True

    def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        has = super()._has
        return super().commit(
            [
                change
                if not change.expected or any(has(*one) for one in change.expected.items())
                else replace(change, before=datetime.min.replace(tzinfo=UTC))
                for change in changes
            ]
        )


class StrictAbsence(MemoryData):
    """Never finds a key absent."""

    def _has(self, key: bytes, version: Version | None) -> bool:
        return version is not None and super()._has(key, version)


class AllOrNone(MemoryData):
    """Applies a commit only if all of its changes can be applied."""

    def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        if all(self._has(*one) for change in changes for one in change.expected.items()):
            return super().commit(changes)
        return [None] * len(changes)


class CountPerKey(MemoryData):
    """A version counts the puts since the last delete."""

    def _apply(self, change: Change) -> Version:
        if change.deletes:
            self._revision = 0
        return super()._apply(change)


class VersionOfValue(MemoryData):
    """A version is made of the values."""

    def _apply(self, change: Change) -> Version:
        super()._apply(change)
        version = Version(b"".join(change.puts.values()))
        self._values.update({key: Versioned(value, version) for key, value in change.puts.items()})
        return version


class TextKeys(MemoryData):
    """Keys end before their zero bytes."""

    def _apply(self, change: Change) -> Version:
        return super()._apply(replace(change, puts={k.rstrip(b"\0"): v for k, v in change.puts.items()}))


class PageMutant(MemoryData):
    def _page(self, wanted: Range, old: object) -> Page:
        return self.change(wanted, super()._page(wanted, {}))

    def change(self, wanted: Range, page: Page) -> Page:
        raise NotImplementedError


class EndIncluded(PageMutant):
    def _page(self, wanted: Range, old: object) -> Page:
        return super()._page(replace(wanted, end=wanted.end + b"\0"), old)

    def change(self, wanted: Range, page: Page) -> Page:
        return page


class MoreIfFull(PageMutant):
    def change(self, wanted: Range, page: Page) -> Page:
        return replace(page, more=len(page.items) == wanted.limit)


class CountOfItems(PageMutant):
    def change(self, wanted: Range, page: Page) -> Page:
        return replace(page, count=len(page.items) if wanted.count else None)


class NoVersionsOfKeys(PageMutant):
    def change(self, wanted: Range, page: Page) -> Page:
        items = [(key, Versioned(b"", Version(b"")) if wanted.keys_only else one) for key, one in page.items]
        return replace(page, items=items)


class NoLimit(MemoryData):
    """Takes a limit of 0 for none."""

    def _page(self, wanted: Range, old: object) -> Page:
        return super()._page(replace(wanted, limit=wanted.limit or None), {})


class FindsTheUnasked(MemoryData):
    def read(self, keys: Collection[bytes], ranges: Sequence[Range], at: int | None) -> View:
        view = super().read(keys, ranges, at)
        return replace(view, found={**view.found, b"clock": Versioned(b"", Version(b""))})


class NewestState(MemoryData):
    """Ignores ``at``."""

    def read(self, keys: Collection[bytes], ranges: Sequence[Range], at: int | None) -> View:
        return super().read(keys, ranges, None)


class NewestRanges(MemoryData):
    """Reads ranges of the newest state."""

    def _page(self, wanted: Range, old: object) -> Page:
        return super()._page(wanted, {})


class BeforeIgnored(MemoryData):
    def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        return super().commit([replace(change, before=None) for change in changes])


class FallingClock(MemoryData):
    """Each answer is of another machine."""

    skew = timedelta(seconds=2)

    def clock(self) -> datetime:
        self.skew = -self.skew
        return datetime.now(UTC) + self.skew


class TimesNotStored(MemoryData):
    """A view's time is ahead, and commits do not store it."""

    def read(self, keys: Collection[bytes], ranges: Sequence[Range], at: int | None) -> View:
        view = super().read(keys, ranges, at)
        assert view.time is not None
        return replace(view, time=view.time + timedelta(minutes=1))


class WrongZone(MemoryData):
    def clock(self) -> datetime:
        return super().clock() + timedelta(hours=1)


class DeletesNotWatched(MemoryData):
    def _apply(self, change: Change) -> Version:
        watches, self.watches = self.watches, self.watches if change.puts else {}
        version = super()._apply(change)
        self.watches = watches
        return version


# Faulty spaces


class FirstRangeWatched(MemorySpace):
    def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        return super().watch(ranges[:1])


class NoFirstHint(MemorySpace):
    async def watch(self, ranges: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[None]:
        hints = super().watch(ranges)
        await anext(hints)
        async for _ in hints:
            yield


class ReadsInTwo(MemorySpace):
    """Reads the keys, and then the ranges."""

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        view = await super().read(keys, at=at)
        return replace(await super().read((), ranges, at=at), found=view.found)


class SharedAnswers(MemorySpace):
    """Concurrent reads get the keys of the last one."""

    _keys: Collection[bytes] = ()

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        self._keys = keys
        await asyncio.sleep(0)
        return await super().read(self._keys, ranges, at=at)


class EachChangeApart(MemorySpace):
    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        return [
            version for change in changes for version in await super(EachChangeApart, self).commit([change])
        ]


class ChecksFirst(MemorySpace):
    """Compares versions, and applies the change later."""

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        results: list[Version | None] = []
        for change in changes:
            view = await self.read(change.expected)
            found = {key: value.version for key, value in view.found.items()}
            if any(found.get(key) != version for key, version in change.expected.items()):
                results.append(None)
            else:
                results += await super().commit([replace(change, expected={})])
        return results


class SmallerThanStated(MemorySpace):
    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        if sum(len(change.expected) + len(change.puts) for change in changes) > 1_000:
            raise TooLarge("1,000 keys")
        return await super().commit(changes)


class SmallValues(MemorySpace):
    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        kept = [replace(c, puts={k: v[:60_000] for k, v in c.puts.items()}) for c in changes]
        return await super().commit(kept)


class UnstatedSnapshots(MemorySpace):
    """Reads no earlier state, and its views have one."""

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        return replace(await super().read(keys, ranges, at=at), at=1)


def shorten_waits(monkeypatch: pytest.MonkeyPatch, check: SpaceCheck) -> None:
    """Wait briefly for hints, because a missing one never comes. Other checks wait only on a slow machine."""
    if check is space_checks.a_watch_reports_commits_in_its_ranges:
        monkeypatch.setattr(space_checks, "WAIT_SECONDS", 2.0)


def small_limits(data: MemoryData) -> MemorySpace:
    return MemorySpace(data, limits=SpaceLimits(expected=8))


def unstated_snapshots(data: MemoryData) -> MemorySpace:
    return UnstatedSnapshots(data, snapshots=False)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (ChecksFirst, space_checks.one_of_competing_changes_happens),
        (SmallerThanStated, space_checks.the_largest_commit_fits),
        (SmallValues, space_checks.the_largest_commit_fits),
        (small_limits, space_checks.the_largest_commit_fits),
        (ReadsInTwo, space_checks.a_read_is_of_one_state),
        (EachChangeApart, space_checks.a_read_is_of_one_state),
        (SharedAnswers, space_checks.concurrent_reads_get_their_own_results),
        (unstated_snapshots, space_checks.an_earlier_state_can_be_read),
        (FirstRangeWatched, space_checks.a_watch_reports_commits_in_its_ranges),
        (NoFirstHint, space_checks.a_watch_reports_commits_in_its_ranges),
    ],
)
async def test_a_check_finds_the_fault(
    make: MakeSpace, check: SpaceCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_waits(monkeypatch, check)
    with pytest.raises((AssertionError, TooLarge)):
        await check(opener(make, MemoryData()))


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (AnyExpectation, space_checks.changes_are_decided_alone),
        (StrictAbsence, space_checks.changes_are_decided_alone),
        (AllOrNone, space_checks.changes_are_decided_alone),
        (CountPerKey, space_checks.a_version_is_never_used_again),
        (VersionOfValue, space_checks.a_version_is_never_used_again),
        (TextKeys, space_checks.any_bytes_are_kept),
        (EndIncluded, space_checks.pages_are_exact),
        (MoreIfFull, space_checks.pages_are_exact),
        (CountOfItems, space_checks.pages_are_exact),
        (NoVersionsOfKeys, space_checks.pages_are_exact),
        (NoLimit, space_checks.pages_are_exact),
        (FindsTheUnasked, space_checks.pages_are_exact),
        (NewestState, space_checks.an_earlier_state_can_be_read),
        (NewestRanges, space_checks.an_earlier_state_can_be_read),
        (BeforeIgnored, space_checks.a_change_has_no_effect_once_its_time_has_come),
        (FallingClock, space_checks.the_clock_never_falls),
        (TimesNotStored, space_checks.the_clock_never_falls),
        (WrongZone, space_checks.the_clock_never_falls),
        (DeletesNotWatched, space_checks.a_watch_reports_commits_in_its_ranges),
    ],
)
async def test_a_check_finds_the_fault_of_the_data(
    data: type[MemoryData], check: SpaceCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_waits(monkeypatch, check)
    with pytest.raises(AssertionError):
        await check(opener(MemorySpace, data()))


# Faults in what a space does after faults


class Resends(MemorySpace):
    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        try:
            return await super().commit(changes)
        except MaybeApplied:
            return await super().commit(changes)


class NeverUnknown(MemorySpace):
    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        try:
            return await super().commit(changes)
        except MaybeApplied:
            raise NotApplied("no answer", retry=True) from None


class LateChangesUnchecked(MemorySpace):
    def release(self) -> None:
        self._late = [[replace(change, expected={}) for change in changes] for changes in self._late]
        super().release()


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (Resends, space_checks.a_lost_reply_is_not_known),
        (NeverUnknown, space_checks.a_lost_reply_is_not_known),
        (Resends, space_checks.a_late_request_is_not_known),
        (NeverUnknown, space_checks.a_late_request_is_not_known),
        (LateChangesUnchecked, space_checks.a_late_request_is_not_known),
    ],
)
async def test_a_check_of_faults_finds_the_fault(mutant: MakeSpace, check: FaultCheck) -> None:
    with pytest.raises(AssertionError):
        await run_fault_check(check, mutant)
