"""The plugin: the memory backend with the smallest limits, which it enforces."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any
from uuid import UUID

from flowstore_core import Backend, LimitExceededError, StepRequest, StoreConfig, hookimpl
from flowstore_core.backend import SMALLEST_LIMITS
from flowstore_core.operations import OPERATIONS
from flowstore_memory.plugin import MemoryBackend
from flowstore_memory.store import MemoryStore, SharedStore


def texts_of(value: Any) -> Iterator[str]:
    """Every text in the arguments of a call, or in an archive."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_of((*value.keys(), *value.values()))
    elif isinstance(value, (tuple, list, frozenset)):
        for item in value:
            yield from texts_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from texts_of(getattr(value, field.name))


def bytes_of(value: Any) -> int:
    return sum(len(text.encode()) for text in texts_of(value))


class LimitedStore(SharedStore):
    """A SharedStore that keeps account of the size of its runs."""

    backend = "limited"
    _sizes: dict[UUID, int]
    """At least the size of each run, in bytes; a value that is replaced is counted until the next export."""

    def begin(self) -> None:
        namespace: Any = self._namespace
        self._sizes = vars(namespace).setdefault("sizes", {})

    async def make_room(self, arguments: Mapping[str, Any]) -> None:
        """Raise LimitExceededError if a call would take its run beyond a limit."""
        archive = arguments.get("archive")
        run_id: UUID = arguments["run_id"] if archive is None else archive.run.run_id
        self._check_steps(run_id, arguments)
        added = bytes_of(tuple(arguments.values()))
        limit = SMALLEST_LIMITS.run_bytes
        assert limit is not None
        if self._sizes.get(run_id, 0) + added > limit:
            stored = await MemoryStore.export_run(self, run_id=run_id)
            self._sizes[run_id] = 0 if stored is None else bytes_of(stored)
            if self._sizes[run_id] + added > limit:
                raise LimitExceededError(self.backend, f"{limit:,} bytes in a run")
        self._sizes[run_id] = self._sizes.get(run_id, 0) + added

    def _check_steps(self, run_id: UUID, arguments: Mapping[str, Any]) -> None:
        run = self._runs.get(run_id.int)
        known = {} if run is None else run.steps
        requests: Sequence[StepRequest] = arguments.get("dispatch", ())
        added = {arguments.get("step_key"), *(request.step_key for request in requests)} - {None}
        archive = arguments.get("archive")
        if archive is not None:
            added = {step.step_key for step in archive.steps}
        limit = SMALLEST_LIMITS.run_steps
        assert limit is not None
        if len(known) + len(added - known.keys()) > limit:
            raise LimitExceededError(self.backend, f"{limit:,} steps in a run")


Operation = Callable[..., Coroutine[Any, Any, Any]]

GROWING = {
    *("start_run", "trigger_run", "import_run", "configure_run", "request_cancel", "mark_timed_out"),
    *("record_step_start", "record_step_complete", "record_skipped_step", "retry_step", "reschedule_step"),
    *("try_claim_step", "try_start_step", "try_record_dispatch", "annotate_dispatch", "advance_run"),
    "redispatch_step",
    *("register_waiter", "deliver_signal", "save_output", "save_outputs", "append_event", "set_tags"),
}
"""The operations that may add a key or a text to their run."""


def _within_limits(operation: Operation) -> Operation:
    @wraps(operation)
    async def limited(self: LimitedStore, **arguments: Any) -> Any:
        await self.make_room(arguments)
        return await operation(self, **arguments)

    return limited


for _name, _operation in inspect.getmembers(SharedStore, inspect.iscoroutinefunction):
    if _name in GROWING:
        assert OPERATIONS[_name].writes
        setattr(LimitedStore, _name, _within_limits(_operation))


class LimitedBackend(MemoryBackend):
    """The descriptor."""

    name = "limited"
    schemes = frozenset({"limited"})
    limits = SMALLEST_LIMITS

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[MemoryStore]:
        plain = replace(config, url=f"memory://{config.url.partition('://')[2]}", scheme="memory")
        async with super().open(plain) as store:
            # The same object, so that closing ends its waiting calls.
            store.__class__ = LimitedStore
            assert isinstance(store, LimitedStore)
            store.begin()
            yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        async with super().scratch(f"memory://{url.partition('://')[2]}") as fresh:
            yield f"limited://{fresh.partition('://')[2]}"


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [LimitedBackend()]
