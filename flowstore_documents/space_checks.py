"""Checks of the promises of ``KeyValueSpace``, for the tests of every space.

A check opens one or two clients of the same data, which is empty at its start, and raises AssertionError if
a promise is broken. A check of faults opens them through an injector. docs/document-toolkit.md shows them
with pytest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from flowstore_core.backend import FaultInjector
from flowstore_documents import clock_register
from flowstore_documents.space import (
    MAX_KEY_BYTES,
    Change,
    KeyValueSpace,
    MaybeApplied,
    NotApplied,
    Page,
    Range,
    SpaceLimits,
    Version,
    Versioned,
)

OpenSpace: TypeAlias = Callable[[], AbstractAsyncContextManager[KeyValueSpace]]
"""Opens a further client of the data of a check."""
SpaceCheck: TypeAlias = Callable[[OpenSpace], Coroutine[None, None, None]]
FaultCheck: TypeAlias = Callable[[OpenSpace, FaultInjector], Coroutine[None, None, None]]

WAIT_SECONDS = 120.0
"""Time limit of everything that a check waits for."""


def require(condition: object, promise: str) -> None:
    if not condition:
        raise AssertionError(promise)


def require_equal(found: object, expected: object, promise: str) -> None:
    require(found == expected, f"{promise}: expected {expected!r:.500}, found {found!r:.500}")


async def put(space: KeyValueSpace, **values: str) -> Version:
    """Put values, whatever the keys have been; their version."""
    puts = {key.encode(): value.encode() for key, value in values.items()}
    (version,) = await space.commit([Change(puts=puts)])
    require(version is not None, "a change without expectations happens")
    assert version is not None
    return version


async def put_all(space: KeyValueSpace, keys: Sequence[bytes]) -> None:
    """Put the value 0 for each key."""
    writes = space.limits.writes
    for start in range(0, len(keys), writes):
        await space.commit([Change(puts=dict.fromkeys(keys[start : start + writes], b"0"))])


async def names(space: KeyValueSpace, at: object | None = None) -> Sequence[bytes]:
    """All keys below 0xff, without that of the clock."""
    page = (await space.read((), [Range(b"", b"\xff")], at=at)).pages[0]
    return [key for key, _ in page.items if key != clock_register.KEY]


async def get(space: KeyValueSpace, key: bytes) -> Versioned | None:
    return (await space.read([key])).found.get(key)


# Commits


async def changes_are_decided_alone(open_space: OpenSpace) -> None:
    """Each change of a commit happens whole, if all its expectations hold, or not at all."""
    async with open_space() as space:
        version = await put(space, a="1")
        other = await put(space, z="1")
        changes = [
            Change({b"a": other}, {b"b": b""}),
            Change({b"c": version}, {b"d": b""}),
            Change({b"e": None, b"a": None}, {b"f": b""}),
            Change({b"a": version, b"g": None}, {b"g": b"", b"h": b"2"}),
            Change({b"z": other}, deletes=[b"z", b"never there"]),
        ]
        size = space.limits.changes
        versions: list[Version | None] = []
        for start in range(0, len(changes), size):
            versions += await space.commit(changes[start : start + size])
        happened = [found is not None for found in versions]
        require_equal(happened, [False, False, False, True, True], "changes whose expectations hold")
        require_equal(await names(space), [b"a", b"g", b"h"], "keys after a commit")
        view = await space.read([b"h", b"g", b"d", b"z"])
        found = {key: value.version for key, value in view.found.items()}
        require_equal(found, dict.fromkeys((b"g", b"h"), versions[3]), "versions of a change")
        (newer,) = await space.commit([Change({b"h": versions[3]}, {b"h": b"3"})])
        require(newer not in (None, versions[3]), "a change receives a version of its own")
        replaced = (await space.read([b"h"])).found[b"h"]
        require_equal((replaced.value, replaced.version), (b"3", newer), "a replaced value")
        stale = await space.commit([Change({b"h": versions[3]}, {b"h": b"4"})])
        require_equal(stale, [None], "a change with a replaced version")


async def a_version_is_never_used_again(open_space: OpenSpace) -> None:
    """Not for an equal value either, or after a delete, or by another client."""
    async with open_space() as one, open_space() as two:
        versions = []
        for space in (one, two, one):
            versions += [await put(space, a="same"), await put(space, a="same")]
            await space.commit([Change(deletes=[b"a"])])
        require_equal(len(set(versions)), len(versions), "the number of versions of a key")


async def any_bytes_are_kept(open_space: OpenSpace) -> None:
    """Keys and values are any bytes, and keys are in the order of their bytes."""
    every = bytes(range(256))
    longest = b"\xfe" * MAX_KEY_BYTES
    values = {every: every, b"\0": b"", b"\0\0": b"\0", b"a": b"\r\n$1\r\n", b"\xc3": b"\xff", longest: b"1"}
    async with open_space() as space:
        await space.commit([Change(puts=values)])
        view = await space.read([*values, b"\xc3\0"], [Range(b"\0", b"\xff")])
        require_equal({key: found.value for key, found in view.found.items()}, values, "values by key")
        require_equal([key for key, _ in view.pages[0].items], sorted(values), "keys in order")


async def one_of_competing_changes_happens(open_space: OpenSpace) -> None:
    """Clients that replace one version at the same time: one change happens for each version."""

    async def increment(space: KeyValueSpace) -> None:
        done = 0
        while done < 5:
            found = (await space.read([b"n"])).found.get(b"n")
            value, version = (0, None) if found is None else (int(found.value), found.version)
            (version,) = await space.commit([Change({b"n": version}, {b"n": b"%d" % (value + 1)})])
            done += version is not None

    async with open_space() as one, open_space() as two, asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*map(increment, [one, two] * 4))
        found = (await one.read([b"n"])).found[b"n"]
        require_equal(found.value, b"40", "the number of increments that were reported as applied")


async def the_largest_commit_fits(open_space: OpenSpace) -> None:
    """The limits that the space states are those that it needs at least, and hold together."""
    async with open_space() as space:
        limits, least = space.limits, SpaceLimits()
        for name in ("value_bytes", "expected", "writes", "request_bytes"):
            require(getattr(limits, name) >= getattr(least, name), f"limits.{name} is large enough")

        before = await space.clock() + timedelta(hours=1)

        def change(number: int, value: bytes) -> Change:
            expected = {b"x%05d-%05d" % (number, index): None for index in range(limits.expected)}
            puts = {b"y%05d-%05d" % (number, index): value for index in range(limits.writes)}
            return Change(expected, puts, before=before)

        key_bytes = (limits.expected + limits.writes) * 12
        count = min(limits.changes, limits.request_bytes // key_bytes)
        free = limits.request_bytes // count - key_bytes
        value = b"v" * min(limits.value_bytes, free // limits.writes)
        changes = [change(number, value) for number in range(count)]
        require(None not in await space.commit(changes), "a commit within all limits is applied")
        written = [key for change in changes for key in change.puts]
        require_equal(await names(space), written, "keys of the largest commit")
        require(
            await space.commit([Change(deletes=changes[0].puts)]) != [None],
            "a change deletes limits.writes keys",
        )
        count = min(limits.writes, limits.request_bytes // (limits.value_bytes + 8))
        puts = {b"large%03d" % number: b"v" * limits.value_bytes for number in range(count)}
        await space.commit([Change(puts=puts)])
        found = (await space.read(puts)).found
        require(
            {key: value.value for key, value in found.items()} == puts, "values of limits.value_bytes fit"
        )


# Reads


async def pages_are_exact(open_space: OpenSpace) -> None:
    """A range ends before its end, tells whether it has more than its limit, and counts beyond it."""
    async with open_space() as space:
        keys = [b"k%d" % number for number in range(5)]
        await put_all(space, [*keys, b"l"])

        async def page(limit: int | None, *, keys_only: bool = False, count: bool = False) -> Page:
            return (await space.read((), [Range(b"k", b"l", limit, keys_only, count)])).pages[0]

        def facts(found: Page) -> tuple[Sequence[bytes], bool, int | None]:
            return [key for key, _ in found.items], found.more, found.count

        await space.clock()  # It may store a key, which a read must not return unless it was asked for.
        found = (await space.read(keys)).found
        require_equal(set(found), set(keys), "the keys that a read finds")
        whole = await page(None)
        require_equal([*whole.items], [(key, found[key]) for key in keys], "the items of a range")
        bare = await page(5, keys_only=True)
        versions = [(key, found[key].version) for key in keys]
        require_equal([(key, item.version) for key, item in bare.items], versions, "a range without values")
        for limit, expected in (
            (None, (keys, False, 5)),
            (2**62, (keys, False, 5)),
            (5, (keys, False, 5)),
            (4, (keys[:4], True, 5)),
            (0, ([], True, 5)),
        ):
            require_equal(facts(await page(limit, count=True)), expected, f"a range with the limit {limit}")
            require_equal(facts(await page(limit)), (*expected[:2], None), "the same without a count")
        view = await space.read(
            [b"k0"], [Range(b"k1", b"k1"), Range(b"k1", b"k1\0", 0), Range(b"x", b"y", 0)]
        )
        require_equal(list(view.found), [b"k0"], "keys of a read with ranges")
        pages = [(len(found.items), found.more) for found in view.pages]
        require_equal(pages, [(0, False), (0, True), (0, False)], "pages of several ranges")


async def a_read_is_of_one_state(open_space: OpenSpace) -> None:
    """However many keys and ranges it has; and a commit is seen as a whole."""
    keys = [b"k%04d" % number for number in range(1_100)]
    first, last = keys[0], keys[-1]
    stop = asyncio.Event()
    seen: set[bytes] = set()

    async def write(space: KeyValueSpace) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            puts = {first: b"%d" % number, last: b"%d" % number}
            changes = [Change(puts={key: value}) for key, value in puts.items()]
            await space.commit(changes if space.limits.changes > 1 else [Change(puts=puts)])
            await asyncio.sleep(0)  # A space in this process may never wait.

    async with open_space() as space, open_space() as other, asyncio.timeout(WAIT_SECONDS):
        await put_all(space, keys)
        writing = asyncio.create_task(write(other))
        try:
            while len(seen) < 10 and not writing.done():
                view = await space.read(keys, [Range(first, first + b"\0"), Range(b"k", b"l")])
                one, whole = view.pages
                require_equal([key for key, _ in whole.items], keys, "keys of a large range")
                values = {view.found[first].value, view.found[last].value, one.items[0][1].value}
                values |= {whole.items[0][1].value, whole.items[-1][1].value}
                require_equal(len(values), 1, "the number of states that one read shows")
                seen |= values
                await asyncio.sleep(0)
        finally:
            stop.set()
            await writing


async def concurrent_reads_get_their_own_results(open_space: OpenSpace) -> None:
    async with open_space() as space:
        keys = [b"k%02d" % number for number in range(50)]
        for key in keys:
            await space.commit([Change(puts={key: key})])

        async def read(key: bytes) -> None:
            view = await space.read([b"none", key], [Range(key, b"l", 1)])
            require_equal([*view.found], [key], "keys that exist")
            require_equal([*view.pages[0].items], [(key, view.found[key])], "a page of one item")
            require_equal(view.found[key].value, key, "a value")

        await asyncio.gather(*map(read, keys * 4))


async def an_earlier_state_can_be_read(open_space: OpenSpace) -> None:
    """With snapshots, whole and in part; without, no view has a state to read again."""
    ranges = [Range(b"", b"\xff", count=True), Range(b"k2", b"k5", 2), Range(b"k", b"l", 0)]
    async with open_space() as space:
        views = []
        for number in range(20):
            puts = {b"k%d" % (number % 7): b"%d" % number}
            await space.commit([Change(puts=puts, deletes=[b"k%d" % ((number + 3) % 7)])])
            views.append(await space.read([b"k1", b"k2"], ranges))
        if not space.snapshots:
            require(all(view.at is None for view in views), "View.at is None without snapshots")
            return
        for view in (*views[::-3], *views[::2]):
            again = await space.read([b"k1", b"k2"], ranges, at=view.at)
            require_equal(again.found, view.found, "keys of an earlier state")
            pages = [([*page.items], page.more, page.count) for page in view.pages]
            found = [([*page.items], page.more, page.count) for page in again.pages]
            require_equal(found, pages, "ranges of an earlier state")


# The clock


async def a_change_has_no_effect_once_its_time_has_come(open_space: OpenSpace) -> None:
    async with open_space() as space, open_space() as other:
        now = await space.clock()
        late, early = (
            Change(puts={b"a": b""}, before=now),
            Change(puts={b"b": b""}, before=now + timedelta(hours=1)),
        )
        for client in (space, other):
            require_equal(await client.commit([late]), [None], "a change whose time has come")
            require(await client.commit([early]) != [None], "a change before its time happens")
        require_equal(await names(space), [b"b"], "keys after changes with times")


async def the_clock_never_falls(open_space: OpenSpace) -> None:
    """For no client, and not below the time of a view once a change with that time has happened."""
    latest = datetime.min.replace(tzinfo=UTC)

    async def ask(space: KeyValueSpace) -> None:
        nonlocal latest
        for number in range(10):
            before = latest
            now = await space.clock()
            require(now >= before, f"the clock does not fall: {now} after {before}")
            before = latest = max(latest, now)
            moment = (await space.read([b"a"])).time
            if moment is not None:
                require(
                    moment >= before,
                    f"the time of a view is not before an earlier time: {moment} after {before}",
                )
                await space.commit([Change(puts={b"a": b""} if number % 2 else {}, time=moment)])
                latest = max(latest, moment)

    async with open_space() as one, open_space() as two:
        now = await one.clock()
        require(abs(now - datetime.now(UTC)) < timedelta(minutes=5), f"the clock is about right: {now}")
        await asyncio.gather(*map(ask, [one, two] * 3))


# Watching


async def a_watch_reports_commits_in_its_ranges(open_space: OpenSpace) -> None:
    """At its start, and after every put and delete in one of them, by whatever client."""
    hints: asyncio.Queue[None] = asyncio.Queue()

    async def watch(space: KeyValueSpace) -> None:
        async for _ in space.watch([(b"a", b"b"), (b"mm", b"mn")]):
            hints.put_nowait(None)

    async def hint(promise: str) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(hints.get(), WAIT_SECONDS)
            return
        raise AssertionError(f"a watch yields {promise}")

    async with open_space() as space, open_space() as other:
        watching = asyncio.create_task(watch(space))
        try:
            await hint("when it is established")
            for key in (b"a", b"a1", b"mm", b"mm1"):
                for change in (Change(puts={key: b"", b"z": b""}), Change(deletes=[b"y", key])):
                    while not hints.empty():
                        hints.get_nowait()
                    await other.commit([change])
                    await hint(f"after a put or delete of {key!r}")
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


# Faults


async def commit_without_reply(space: KeyValueSpace, change: Change, faults: FaultInjector) -> None:
    """Commit a change to which the armed fault happens."""
    try:
        await space.commit([change])
    except MaybeApplied:
        require(faults.disarm(), "the injector disturbs the next commit")
    except NotApplied as error:
        raise AssertionError(f"a commit without a reply raises MaybeApplied, not {error!r}") from error
    else:
        raise AssertionError("a commit without a reply raises MaybeApplied, and is not sent again")


async def get_later(space: KeyValueSpace, key: bytes, value: bytes) -> Versioned:
    """Wait until a key has a value: the connection is being replaced, and the server may be slow."""
    found = None
    with suppress(TimeoutError):
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                with suppress(NotApplied):
                    found = await get(space, key)
                if found is not None and found.value == value:
                    return found
                await asyncio.sleep(0.01)
    raise AssertionError(f"a commit without a reply has happened: expected {value!r}, found {found}")


async def a_lost_reply_is_not_known(open_space: OpenSpace, faults: FaultInjector) -> None:
    """The commit has happened, and is not sent again."""
    async with open_space() as space:
        for number in range(3):
            version = await put(space, a=str(number))
            faults.lose_reply()
            await commit_without_reply(space, Change({b"a": version}, {b"a": b"lost"}), faults)
            await get_later(space, b"a", b"lost")


async def a_late_request_is_not_known(open_space: OpenSpace, faults: FaultInjector) -> None:
    """It has its effect when it arrives, if its expectations hold then."""
    async with open_space() as space:
        for number in range(2):
            version = await put(space, a=str(number))
            faults.hold_request()
            await commit_without_reply(space, Change({b"a": version}, {b"a": b"late"}), faults)
            await faults.release_request()
            await get_later(space, b"a", b"late")
            faults.hold_request()
            await commit_without_reply(space, Change({b"a": version}, {b"a": b"stale"}), faults)
            late = await get_later(space, b"a", b"late")
            await faults.release_request()
            require_equal(await get(space, b"a"), late, "a value after a late commit with a stale version")


SPACE_CHECKS: Sequence[SpaceCheck] = (
    changes_are_decided_alone,
    a_version_is_never_used_again,
    any_bytes_are_kept,
    one_of_competing_changes_happens,
    the_largest_commit_fits,
    pages_are_exact,
    a_read_is_of_one_state,
    concurrent_reads_get_their_own_results,
    an_earlier_state_can_be_read,
    a_change_has_no_effect_once_its_time_has_come,
    the_clock_never_falls,
    a_watch_reports_commits_in_its_ranges,
)
FAULT_CHECKS: Sequence[FaultCheck] = (a_lost_reply_is_not_known, a_late_request_is_not_known)
