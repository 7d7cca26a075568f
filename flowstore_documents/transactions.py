"""The transaction of an operation: read documents, decide, commit if what was read still holds, else again.

Every operation is a coroutine that gets a Transaction. It reads from one state, changes documents, and
returns its result; it has no other effect, because it is called again when another change came first.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol, TypeVar, overload
from uuid import UUID
from weakref import WeakValueDictionary

from flowstore_core import FlowStoreError, OutcomeUnknownError, StoreUnavailableError
from flowstore_documents import keys
from flowstore_documents.committer import Committer, Retries
from flowstore_documents.shared_reads import SharedReads
from flowstore_documents.space import (
    AppliedOrRefused,
    Change,
    KeyValueSpace,
    MaybeApplied,
    NotApplied,
    Page,
    Range,
    SnapshotGone,
    SpaceLimits,
    Version,
    Versioned,
    View,
    change_bytes,
)
from flowstore_documents.texts import LongText, ReadText, StagedTexts, Text, piece_keys

T = TypeVar("T")

PAGE = 1_000
"""Number of items that one read of a range asks for, if the space has snapshots."""
AHEAD = 50
"""Number of items of a range that are read together with the documents of a run."""
CONFLICT_SECONDS = 60.0
"""How long an operation tries against other changes."""
MAX_CONFLICT_PAUSE = 0.05
TOKENS_OF_MARK = 2_000
"""Number of long texts that share a mark: their tokens fit into one value."""
SLOT_BYTES = 256
"""Room in a change for its slot."""

_log = logging.getLogger("flowstore_documents")

Now = Callable[[], datetime]


class IntentMet(Exception):  # noqa: N818 - a fact about a run
    """The run has an intent, which must be finished first."""

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        super().__init__()


class Changed(Exception):  # noqa: N818
    """A value that the transaction read has changed; the transaction begins again."""


class WrittenRun(Protocol):
    """The run that a transaction writes to: run_state.py."""

    run_id: UUID

    @property
    def must_stage(self) -> bool:
        """Whether the change is staged however small it is."""
        ...

    def flush(self) -> None:
        """Write the documents that have changed, and their index entries."""
        ...

    def stage(self, change: Change) -> tuple[Change, Mapping[str, Sequence[bytes]]]:
        """Replace a change that is too large by one with an intent, and the pieces that the intent names."""
        ...


class Transaction:
    """One try of an operation. Everything it reads is one state, if the space has snapshots or it writes."""

    def __init__(
        self, space: KeyValueSpace, reads: SharedReads, texts: StagedTexts, clock: Now | None, tries: int
    ) -> None:
        self.limits: SpaceLimits = space.limits
        self.tries = tries
        """Number of earlier tries that lost against another change."""
        self.run: WrittenRun | None = None
        """The run that the transaction writes to."""
        self.versions: dict[bytes, Version | None] = {}
        """The versions of all keys that were read."""
        self.expected: set[bytes] = set()
        """The keys that must be unchanged when the transaction commits."""
        self.clock_reading: tuple[datetime, float] | None = None
        """The time of the newest read, and when it was read, by time.monotonic()."""
        self.time: datetime | None = None
        """The time on which the transaction was decided, if others may not know it yet."""
        self._space = space
        self._reads = reads
        self._texts = texts
        self._clock = clock
        self._found: dict[bytes, Versioned | None] = {}
        self._pages: dict[tuple[bytes, bytes], Page] = {}
        self._puts: dict[bytes, bytes] = {}
        self._deletes: set[bytes] = set()
        self._at: object | None = None
        self._views = 0

    async def now(self) -> datetime:
        """The store's time. Asked for after reading, it is not before any time that was read."""
        if self._clock is not None:
            return self._clock()
        if self.clock_reading is None:
            return await self._space.clock()
        self.time = self.clock_reading[0]
        return self.time

    # Reading

    async def read(
        self, wanted: Collection[bytes], ranges: Sequence[Range] = (), *, expect: bool = True
    ) -> View:
        """Read keys and ranges. With ``expect`` the commit needs the keys to be unchanged.

        A key is read once: the transaction remembers its value.
        """
        if expect:
            self.expected.update(wanted)
        missing = [key for key in wanted if key not in self._found]
        pages: Sequence[Page] = ()
        if missing or ranges or not self._views:
            view = await self._reads.read(missing, ranges, at=self._at)
            self._views += 1
            self.clock_reading = None if view.time is None else (view.time, time.monotonic())
            if self._space.snapshots:
                self._at = view.at
            for key in missing:
                found = self._found[key] = view.found.get(key)
                self._saw(key, None if found is None else found.version)
            pages = view.pages
            for page, asked in zip(pages, ranges, strict=True):
                if not asked.keys_only:
                    for key, value in page.items:
                        self._saw(key, value.version)
            if len(missing) == len(wanted):
                return view
        return View({key: found for key in wanted if (found := self._found[key]) is not None}, pages)

    def _saw(self, key: bytes, version: Version | None) -> None:
        if self.versions.setdefault(key, version) != version:
            raise Changed

    async def read_ahead(
        self, wanted: Collection[bytes], ahead: Sequence[Range], ranges: Sequence[Range] = ()
    ) -> View:
        """Read keys and ranges, and for later scans of some ranges their first items. The commit needs none.

        The pages of the view are those of ``ranges``.
        """
        if not ahead:
            return await self.read(wanted, ranges, expect=False)
        short = [replace(one, limit=AHEAD if one.limit is None else min(one.limit, AHEAD)) for one in ahead]
        view = await self.read(wanted, [*ranges, *short], expect=False)
        pages = view.pages[len(ranges) :]
        self._pages = {(one.start, one.end): page for one, page in zip(ahead, pages, strict=True)}
        return View(view.found, view.pages[: len(ranges)])

    async def scan(self, wanted: Range) -> list[tuple[bytes, Versioned]]:
        """All items of a range, up to its limit, in pages."""
        page = self._pages.pop((wanted.start, wanted.end), None)
        items = [] if page is None else list(page.items)
        while (page is None or page.more) and (wanted.limit is None or len(items) < wanted.limit):
            if not self._space.snapshots:
                return list((await self.read((), [wanted])).pages[0].items)
            start = items[-1][0] + b"\0" if items else wanted.start
            left = PAGE if wanted.limit is None else min(PAGE, wanted.limit - len(items))
            page = (await self.read((), [replace(wanted, start=start, limit=left)])).pages[0]
            items += page.items
        return items[: wanted.limit]

    async def read_texts(self, run_id: UUID, texts: Collection[Text | None]) -> ReadText:
        """Read the pieces of texts of a run."""
        return await self.read_pieces([(run_id, text) for text in texts])

    async def read_pieces(
        self, texts: Collection[tuple[UUID, Text | None]], *, count: int | None = None
    ) -> ReadText:
        """Like read_texts, of several runs; only the first ``count`` pieces of each."""
        long = {text: run_id for run_id, text in texts if isinstance(text, LongText)}
        found: dict[LongText, str] = {}
        for text, run_id in long.items():
            wanted = piece_keys(run_id, text, count=count)
            data = bytearray()
            for start in range(0, len(wanted), 16):
                some = wanted[start : start + 16]
                view = await self.read(some, expect=False)
                if len(view.found) < len(some):
                    raise Changed  # Another call has replaced the text, which only happens without snapshots.
                for key in some:
                    data += view.found[key].value
            # A part of a text may end within a character.
            found[text] = data.decode(errors="ignore")
        return lambda text: found[text] if isinstance(text, LongText) else text

    # Writing

    @overload
    def text(self, text: str, owner: bytes = b"") -> Text: ...

    @overload
    def text(self, text: str | None, owner: bytes = b"") -> Text | None: ...

    def text(self, text: str | None, owner: bytes = b"") -> Text | None:
        """A text for a document; the commit stores its pieces if it is long.

        A document whose pieces may be deleted before its run is the owner: it shares them with no other one.
        """
        return self._texts.put(text, owner)

    def text_tokens(self) -> Collection[str]:
        """The tokens of the long texts of the operation."""
        return self._texts.pieces().keys()

    def put(self, key: bytes, value: bytes = b"") -> None:
        self._deletes.discard(key)
        self._puts[key] = value

    def delete(self, key: bytes) -> None:
        self._puts.pop(key, None)
        self._deletes.add(key)

    def expect(self, *wanted: bytes) -> None:
        """The commit needs the keys to be as they were read."""
        self.expected.update(wanted)

    def change(self) -> Change | None:
        """The change that the transaction makes; None: it only reads."""
        if self.run is not None:
            self.run.flush()
        if not self._puts and not self._deletes:
            return None
        expected = {key: self.versions[key] for key in self.expected}
        return Change(expected, self._puts, self._deletes, time=self.time)

    async def is_consistent(self) -> bool:
        """Whether what a transaction that only reads has read is one state."""
        if self._space.snapshots or self._views <= 1:
            return True
        view = await self._reads.read(list(self.versions))
        return all(
            (None if (found := view.found.get(key)) is None else found.version) == version
            for key, version in self.versions.items()
        )


class Transactions:
    """Runs the transactions of one store."""

    def __init__(self, space: KeyValueSpace, committer: Committer, clock: Now | None) -> None:
        """``clock`` replaces the space's clock."""
        self.space = space
        self.committer = committer
        self._reads = SharedReads(space)
        self._clock = clock
        self._hot_keys: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self.roll_forward: Callable[[UUID], Awaitable[None]]
        """Finishes the intent of a run; set by intents.py."""

    async def run(
        self, operation: str, work: Callable[[Transaction], Awaitable[T]], *, hot_key: bytes | None = None
    ) -> T:
        """Run an operation to its end: its result, or the error that it raised.

        Operations of this store that change the same ``hot_key`` take turns: only one of them can commit.
        """
        retries = self.committer.retries(operation)
        if hot_key is None:
            return await self._run(operation, work, retries)
        lock = self._hot_keys.setdefault(hot_key, asyncio.Lock())
        async with lock:
            return await self._run(operation, work, retries)

    async def _run(self, operation: str, work: Callable[[Transaction], Awaitable[T]], retries: Retries) -> T:
        texts = StagedTexts(self.space.limits)
        deadline = time.monotonic() + CONFLICT_SECONDS
        tries = 0
        while True:
            if self.committer.has_doubts:
                # A change without an answer must not take effect after the result of this one (CON-3).
                await self.committer.settle_doubts()
            transaction = Transaction(self.space, self._reads, texts, self._clock, tries)
            try:
                try:
                    result = await work(transaction)
                    self.committer.saw_clock(transaction.clock_reading)
                    change = transaction.change()
                except FlowStoreError:
                    if await self._is_answer(transaction):
                        raise
                else:
                    if change is None:
                        if await self._is_answer(transaction):
                            return result
                    elif await self._commit(operation, transaction, change, texts):
                        return result
            except IntentMet as met:
                await self.roll_forward(met.run_id)
                continue
            except NotApplied as error:
                await retries.wait(error.reason, retry=error.retry)
                continue
            except (SnapshotGone, Changed):
                pass
            finally:
                # The run refers to its transaction: the cycle would be left to the garbage collector.
                transaction.run = None
            if time.monotonic() > deadline:
                raise StoreUnavailableError("too many concurrent changes of one run")
            tries += 1
            await asyncio.sleep(random.uniform(0, min(0.001 * tries, MAX_CONFLICT_PAUSE)))

    async def aclose(self) -> None:
        """End the reads in progress. Their callers were cancelled, or get StoreUnavailableError."""
        await self._reads.aclose()

    async def _is_answer(self, transaction: Transaction) -> bool:
        """Whether what a transaction without a change has found may be told.

        The time on which it depends is told to all others first.
        """
        if not await transaction.is_consistent():
            return False
        if transaction.time is not None:
            try:
                await self.space.commit([Change(time=transaction.time)])
            except AppliedOrRefused as error:
                raise NotApplied(error.reason, retry=False) from None
            except MaybeApplied:
                return False
        # Last: no change whose outcome became unknown meanwhile may take effect after the answer (CON-3).
        return not self.committer.has_doubts

    async def _commit(
        self, operation: str, transaction: Transaction, change: Change, texts: StagedTexts
    ) -> bool:
        pieces: dict[str, Sequence[bytes]] = {**texts.pieces()}
        run = transaction.run
        must_stage = run is not None and run.must_stage
        if not pieces and self._fits(change) and not must_stage:
            return await self.committer.commit(operation, change)
        assert run is not None
        small = _with_puts(
            change,
            {
                keys.piece(run.run_id, token, number): piece
                for token, parts in pieces.items()
                for number, piece in enumerate(parts)
            },
        )
        if self._fits(small) and not must_stage:
            return await self.committer.commit(operation, small)
        # The commit also deletes the marks of its pieces: those of earlier tries, and a new one.
        new_marks = len(pieces) // TOKENS_OF_MARK + 1
        more_writes = len(set(texts.marks.values())) + new_marks
        is_staged = must_stage or not self._fits(change, more_writes=more_writes)
        if is_staged:
            change, staged = run.stage(change)
            pieces |= staged
        new = {token: parts for token, parts in pieces.items() if (run.run_id, token) not in texts.marks}
        if new:
            marks_of_tokens = await self._upload(operation, run.run_id, new)
            texts.marks.update({(run.run_id, token): mark for token, mark in marks_of_tokens.items()})
        marks = {texts.marks[run.run_id, token] for token in pieces}
        change = replace(change, deletes={*change.deletes, *marks})
        if not await self.committer.commit(operation, change):
            return False
        if is_staged:
            await self.finish(operation, run.run_id)
        return True

    async def settle(
        self, operation: str, run_id: UUID, decided: Callable[[Transaction], Awaitable[bool]]
    ) -> bool:
        """Finish an intent whose outcome is not known before its end, and read the outcome."""
        try:
            await self.roll_forward(run_id)
            return await self.run(operation, decided)
        except StoreUnavailableError:
            # Any process may finish the intent later.
            raise OutcomeUnknownError(operation) from None

    async def finish(self, operation: str, run_id: UUID) -> None:
        """Finish an intent of this operation, which has happened in any case."""
        try:
            await self.roll_forward(run_id)
        except StoreUnavailableError:
            _log.info("%s is left for a later call to finish", operation, exc_info=True)

    def _fits(self, change: Change, *, more_writes: int = 0) -> bool:
        limits = self.space.limits
        return (
            len(change.expected) < limits.expected
            and len(change.puts) + len(change.deletes) + more_writes < limits.writes
            and change_bytes(change) + SLOT_BYTES * (1 + more_writes) <= limits.request_bytes
        )

    async def _upload(
        self, operation: str, run_id: UUID, pieces: Mapping[str, Sequence[bytes]]
    ) -> Mapping[str, bytes]:
        """Store pieces ahead of the commit that refers to them, with marks that the commit deletes.

        cleanup deletes the pieces of an old mark: their commit did not come. Returns the mark of each token.
        """
        puts = staged_marks(await self.committer.space_time(operation), run_id, list(pieces))
        marks = {token: mark for mark, tokens in puts.items() for token in tokens.decode().split("\0")}
        for token, parts in pieces.items():
            for number, part in enumerate(parts):
                puts[keys.piece(run_id, token, number)] = part
        await self.write_all(operation, {}, puts, ())
        return marks

    async def write_all(
        self,
        operation: str,
        expected: Mapping[bytes, Version | None],
        puts: Mapping[bytes, bytes],
        deletes: Collection[bytes],
    ) -> bool:
        """Make many writes in several commits, in their order. False as soon as an expectation fails."""
        writes: list[tuple[bytes, bytes | None]] = [*puts.items(), *((key, None) for key in deletes)]
        for some in self._batches(writes):
            change = Change(
                expected,
                {key: value for key, value in some if value is not None},
                [key for key, value in some if value is None],
            )
            while not await self.committer.commit(operation, change):
                if expected:
                    return False
        return True

    def _batches(
        self, writes: Sequence[tuple[bytes, bytes | None]]
    ) -> Iterator[Sequence[tuple[bytes, bytes | None]]]:
        """The writes in groups that fit into one change each, beside its expectation and its slot."""
        limits = self.space.limits
        batch: list[tuple[bytes, bytes | None]] = []
        left = limits.request_bytes - 2 * SLOT_BYTES
        for key, value in writes:
            size = len(key) + len(value or b"")
            if batch and (len(batch) >= limits.writes - 1 or size > left):
                yield batch
                batch, left = [], limits.request_bytes - 2 * SLOT_BYTES
            batch.append((key, value))
            left -= size
        if batch:
            yield batch


def staged_marks(now: datetime, run_id: UUID, tokens: Sequence[str]) -> dict[bytes, bytes]:
    """The marks of pieces, by which cleanup finds them; the value of each lists some of their tokens."""
    groups = [tokens[start : start + TOKENS_OF_MARK] for start in range(0, len(tokens), TOKENS_OF_MARK)]
    return {keys.staged(now, run_id, some[0]): "\0".join(some).encode() for some in groups}


def _with_puts(change: Change, puts: Mapping[bytes, bytes]) -> Change:
    return replace(change, puts={**change.puts, **puts})
