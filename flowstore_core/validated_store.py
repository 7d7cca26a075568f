"""The store that open_store returns: it validates and normalises arguments once, for every backend.

Each method checks its arguments (INP), then raises if the store is closed or lacks the capability, then calls
the backend with every parameter by keyword. The protocols in the noun files document the operations.
"""

from __future__ import annotations

import asyncio
import os
from asyncio import AbstractEventLoop
from asyncio import _get_running_loop as running_loop
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias
from uuid import UUID
from weakref import WeakSet

from flowstore_core.archive_validation import check_archive
from flowstore_core.claims import StepClaim, StepDispatch
from flowstore_core.controls import FlowRunControlRecord, TriggerResult
from flowstore_core.errors import ConfigurationError, FlowStoreError, NotSupportedError, StoreClosedError
from flowstore_core.events import FlowEventRecord
from flowstore_core.limits import LARGEST_LIMITS, LimitCheck, StoreLimits
from flowstore_core.operations import BASE_OPERATIONS, CAPABILITY_METHODS
from flowstore_core.queues import ClaimedStep, EndedStep, QueueStatistics, RunAdvance, StepRequest
from flowstore_core.runs import FlowRunDetail, FlowRunRecord, RunPage, RunPosition
from flowstore_core.signals import BufferedSignal, FlowSignalWaiter, SignalDeliveryResult
from flowstore_core.statistics import DashboardStatistics, RunTimeseriesBucket
from flowstore_core.status import Capability, RunStatus, RunTimeseriesGranularity, StepStatus
from flowstore_core.steps import FlowStepRecord, StalledStep
from flowstore_core.store import FlowStore
from flowstore_core.transfer import RunArchive
from flowstore_core.validation import (
    MAX_CLAIMS,
    MAX_INT64,
    MAX_JOB_ID,
    check_bool,
    check_claim_lease,
    check_claims,
    check_datetime,
    check_ended_steps,
    check_expected,
    check_final_outcome,
    check_granularity,
    check_id,
    check_ids,
    check_int,
    check_key,
    check_keys,
    check_lease,
    check_outputs,
    check_position,
    check_prefix,
    check_priority,
    check_queue_arguments,
    check_queues,
    check_requests,
    check_run_outcome,
    check_run_status,
    check_search,
    check_skip,
    check_step_outcome,
    check_tag_changes,
    check_tags,
    check_take,
    check_text,
    check_timeout,
    check_window,
)

_QUEUE_ARGUMENTS = ("queue", "priority", "step_type", "input_json")
_NOTHING: Mapping[str, Any] = MappingProxyType({})
"""No further arguments: a backend need not know the keywords of a capability that it lacks."""


class _AlwaysRaises:
    """A substitute for a backend's store on which every operation raises.

    An operation raises when it is called, not when it is looked up, so that argument errors come first. An
    open store needs no check: closing it replaces the target of its operations.
    """

    def __init__(self, error: Callable[[str], FlowStoreError]) -> None:
        self._error = error

    def __getattr__(self, operation: str) -> Callable[..., NoReturn]:
        def refuse(**arguments: object) -> NoReturn:
            raise self._error(operation)

        return refuse


_OTHER_LOOP = _AlwaysRaises(
    lambda operation: ConfigurationError(
        "a store belongs to the event loop that it was opened in; open a new store in this loop"
    )
)
_FORKED = _AlwaysRaises(
    lambda operation: ConfigurationError("a store cannot be used in a forked process; open a new store there")
)
_CLOSED = _AlwaysRaises(lambda operation: StoreClosedError())

_Targets: TypeAlias = dict[AbstractEventLoop | None, Any]


class _ByLoop(dict[AbstractEventLoop | None, FlowStore]):
    """The target of operations by running event loop: the backend's store in its own loop.

    The thread is not a sufficient key: a second loop can run inside the first in the same thread, as in
    notebooks. In Python 3.11 looking up the loop is a system call and takes 0.1 to 0.5 microseconds more than
    looking up the thread. It is a dictionary because every call of every store uses it, and no Python code is
    as fast.
    """

    def __init__(self, fallback: Any, known: _Targets) -> None:
        super().__init__(known)
        self._fallback: FlowStore = fallback

    def __missing__(self, loop: AbstractEventLoop | None) -> FlowStore:
        return self._fallback


class _PartialStore:
    """A backend's store that implements only a part of the base protocols."""

    def __init__(self, store: Any, backend: str) -> None:
        self._store = store
        self._rest = _AlwaysRaises(lambda operation: NotSupportedError(backend, "base", operation))

    def __getattr__(self, operation: str) -> Any:
        return getattr(self._store, operation, None) or getattr(self._rest, operation)


class _LimitedStore:
    """A backend's store with lower limits than the contract's, or a substitute for it (LIM-1)."""

    def __init__(self, store: Any, check: LimitCheck) -> None:
        self._store = store
        self._check = check

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        call = getattr(self._store, operation)

        def within_limits(**arguments: Any) -> Any:
            self._check.check(arguments)
            return call(**arguments)

        return within_limits


class ValidatedStore:
    """A FlowStore around a backend's store; see the module's docstring.

    Operations raise ConfigurationError in any other event loop and in a forked process: connections, threads
    and locks belong to one event loop of one process. Backends need not check this.
    """

    # The backend's store for the operations of each capability that has some; _assign sets them.
    _leases: _ByLoop
    _trigger: _ByLoop
    _recovery: _ByLoop
    _queues: _ByLoop
    _watch: _ByLoop
    _deadlines: _ByLoop
    _waiters: _ByLoop
    _mailbox: _ByLoop
    _events: _ByLoop
    _outputs: _ByLoop
    _dashboard: _ByLoop
    _deletion: _ByLoop
    _transfer: _ByLoop
    _tags: _ByLoop

    def __init__(
        self,
        store: Any,
        backend: str,
        capabilities: frozenset[Capability],
        stack: AsyncExitStack,
        *,
        limits: StoreLimits = LARGEST_LIMITS,
        max_skew: timedelta | None = None,
    ) -> None:
        self._backend = backend
        self._capabilities = capabilities
        self._limits = limits
        self._max_skew = max_skew
        self._limit_check = LimitCheck(limits, backend) if LimitCheck.is_needed(limits) else None
        self._stack = stack
        self._closed: asyncio.Event | None = None
        self._loop: AbstractEventLoop | None = asyncio.get_running_loop()
        loop = self._loop
        self._assign(lambda of: (_OTHER_LOOP, {loop: self._target(store, of)}))
        _open.add(self)

    def _target(self, store: Any, capability: Capability | None) -> Any:
        if capability is None:
            complete = all(hasattr(store, operation) for operation in BASE_OPERATIONS)
            return store if complete else _PartialStore(store, self._backend)
        if capability in self._capabilities:
            return store
        return _AlwaysRaises(lambda operation: NotSupportedError(self._backend, capability.value, operation))

    def _assign(self, targets: Callable[[Capability | None], tuple[Any, _Targets]]) -> None:
        """Set the fallback and the targets by event loop of each capability; None: the base protocols."""
        self._store = self._by_loop(*targets(None))
        for capability in CAPABILITY_METHODS:
            setattr(self, f"_{capability}", self._by_loop(*targets(capability)))

    def _by_loop(self, fallback: Any, targets: _Targets) -> _ByLoop:
        check = self._limit_check
        if check is not None:
            # The fallback too: limits of arguments are checked before whether the store is closed.
            fallback = _LimitedStore(fallback, check)
            targets = {loop: _LimitedStore(target, check) for loop, target in targets.items()}
        return _ByLoop(fallback, targets)

    def _tagged(self, store: FlowStore, operation: str, tags: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
        """An operation of the backend's store with the keyword ``tags``, which belongs to TAGS."""
        checked = check_tags(tags)
        if checked and Capability.TAGS not in self._capabilities:
            store = self._tags[running_loop()]
        call: Callable[..., Coroutine[Any, Any, Any]] = getattr(store, operation)
        return partial(call, tags=checked) if checked else call

    def __repr__(self) -> str:
        return f"<flowstore {self._backend}{' (closed)' if self._closed else ''}>"

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._capabilities

    @property
    def limits(self) -> StoreLimits:
        return self._limits

    @property
    def max_skew(self) -> timedelta | None:
        return self._max_skew

    async def ping(self) -> None:
        await self._store[running_loop()].ping()

    def _invalidate_after_fork(self) -> None:
        """Make every operation raise: this is the copy of a store in a forked process."""
        self._loop = None
        self._assign(lambda of: (_FORKED, {}))

    async def aclose(self) -> None:
        if self._loop is None:
            # The parent process still uses the connections.
            return
        if self._closed is not None and self._closed.is_set():
            return
        if self._loop is not running_loop():
            raise ConfigurationError(
                "a store belongs to the event loop that it was opened in; close it in that loop"
            )
        if self._closed is not None:
            await self._closed.wait()
            return
        self._closed = asyncio.Event()
        self._assign(lambda of: (_CLOSED, {}))
        try:
            # In this task, because a backend's context may hold a task group.
            await self._stack.aclose()
        finally:
            self._closed.set()

    # Runs

    async def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> FlowRunRecord:
        store = self._store[running_loop()]
        call = store.start_run if tags is None else self._tagged(store, "start_run", tags)
        return await call(
            flow_id=check_id("flow_id", flow_id),
            flow_name=check_key("flow_name", flow_name),
            run_id=check_id("run_id", run_id),
            trigger_key=check_key("trigger_key", trigger_key),
            trigger_data=None if trigger_data is None else check_text("trigger_data", trigger_data),
            job_id=None if job_id is None else check_key("job_id", job_id, MAX_JOB_ID),
            source_run_id=None if source_run_id is None else check_id("source_run_id", source_run_id),
        )

    async def complete_run(
        self,
        run_id: UUID,
        status: RunStatus | str,
        *,
        expected: Mapping[str, StepStatus | str] | None = None,
    ) -> bool:
        return await self._store[running_loop()].complete_run(
            run_id=check_id("run_id", run_id),
            status=check_run_outcome(status),
            expected=check_expected(expected),
        )

    async def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        tags: Mapping[str, str] | None = None,
    ) -> Sequence[FlowRunRecord]:
        store = self._store[running_loop()]
        call = store.get_runs if tags is None else self._tagged(store, "get_runs", tags)
        return await call(
            flow_id=None if flow_id is None else check_id("flow_id", flow_id),
            after=check_position(after),
            skip=check_skip(skip),
            take=check_take(take),
        )

    async def get_runs_page(
        self,
        flow_id: UUID | None = None,
        *,
        status: RunStatus | str | None = None,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        search: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunPage:
        store = self._dashboard[running_loop()]
        call = store.get_runs_page if tags is None else self._tagged(store, "get_runs_page", tags)
        return await call(
            flow_id=None if flow_id is None else check_id("flow_id", flow_id),
            status=None if status is None else check_run_status(status),
            after=check_position(after),
            skip=check_skip(skip),
            take=check_take(take),
            search=check_search(search),
        )

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        return await self._store[running_loop()].get_run(run_id=check_id("run_id", run_id))

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        return await self._store[running_loop()].get_run_detail(run_id=check_id("run_id", run_id))

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        return await self._store[running_loop()].get_run_status(run_id=check_id("run_id", run_id))

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        return await self._store[running_loop()].get_active_runs(
            take=None if take is None else check_take(take)
        )

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        return await self._store[running_loop()].get_derived_runs(
            source_run_id=check_id("source_run_id", source_run_id),
            take=None if take is None else check_take(take),
        )

    async def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        await self._tags[running_loop()].set_tags(
            run_id=check_id("run_id", run_id), tags=check_tag_changes(tags)
        )

    # Steps

    async def record_step_start(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        input_json: str | None = None,
        job_id: str | None = None,
        owner: str | None = None,
    ) -> int:
        return await self._store[running_loop()].record_step_start(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            step_type=check_key("step_type", step_type),
            input_json=None if input_json is None else check_text("input_json", input_json),
            job_id=None if job_id is None else check_key("job_id", job_id, MAX_JOB_ID),
            owner=None if owner is None else check_key("owner", owner),
        )

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus | str,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
        attempt: int | None = None,
        owner: str | None = None,
    ) -> None:
        await self._store[running_loop()].record_step_complete(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            status=check_step_outcome(status),
            output_json=None if output_json is None else check_text("output_json", output_json),
            error_message=None if error_message is None else check_text("error_message", error_message),
            attempt=None if attempt is None else check_int("attempt", attempt, 1, MAX_INT64),
            owner=None if owner is None else check_key("owner", owner),
        )

    async def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        await self._store[running_loop()].record_skipped_step(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            step_type=check_key("step_type", step_type),
            reason=None if reason is None else check_text("reason", reason),
            owner=None if owner is None else check_key("owner", owner),
        )

    async def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        requests = check_requests(dispatch)
        await (self._queues if requests else self._store)[running_loop()].retry_step(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            attempt=None if attempt is None else check_int("attempt", attempt, 1, MAX_INT64),
            reset=check_keys("reset", reset),
            **({"dispatch": requests} if requests else _NOTHING),
        )

    async def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        return await self._store[running_loop()].get_step(
            run_id=check_id("run_id", run_id), step_key=check_key("step_key", step_key)
        )

    async def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        return await self._store[running_loop()].get_step_statuses(run_id=check_id("run_id", run_id))

    async def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None = None,
        error_message: str | None = None,
        due_at: datetime | None = None,
        owner: str | None = None,
    ) -> None:
        failed = error_message is not None
        await (self._queues if failed else self._recovery)[running_loop()].reschedule_step(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            attempt=check_int("attempt", attempt, 1, MAX_INT64),
            output_json=None if output_json is None else check_text("output_json", output_json),
            due_at=None if due_at is None else check_datetime("due_at", due_at),
            owner=None if owner is None else check_key("owner", owner),
            **({"error_message": check_text("error_message", error_message)} if failed else _NOTHING),
        )

    async def get_stalled_steps(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[StalledStep]:
        return await self._recovery[running_loop()].get_stalled_steps(
            as_of=None if as_of is None else check_datetime("as_of", as_of), take=check_take(take)
        )

    # Claims and the dispatch ledger

    async def try_record_dispatch(
        self,
        run_id: UUID,
        step_key: str,
        *,
        due_at: datetime | None = None,
        queue: str | None = None,
        priority: int = 0,
        step_type: str | None = None,
        input_json: str | None = None,
    ) -> bool:
        queued = check_queue_arguments(queue, priority, step_type, input_json)
        named = _NOTHING if queue is None else dict(zip(_QUEUE_ARGUMENTS, queued, strict=True))
        return await (self._store if queue is None else self._queues)[running_loop()].try_record_dispatch(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            due_at=None if due_at is None else check_datetime("due_at", due_at),
            **named,
        )

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        await self._store[running_loop()].annotate_dispatch(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            job_id=check_key("job_id", job_id, MAX_JOB_ID),
        )

    async def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        await self._store[running_loop()].release_dispatch(
            run_id=check_id("run_id", run_id), step_key=check_key("step_key", step_key)
        )

    async def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        return await self._store[running_loop()].get_dispatched_step_keys(run_id=check_id("run_id", run_id))

    async def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        return await self._store[running_loop()].get_dispatches(run_id=check_id("run_id", run_id))

    async def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        return await (self._store if lease is None else self._leases)[running_loop()].try_claim_step(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            owner=None if owner is None else check_key("owner", owner),
            **({"lease": check_claim_lease(owner, lease)} if lease is not None else _NOTHING),
        )

    async def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        await self._store[running_loop()].release_step_claim(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            owner=None if owner is None else check_key("owner", owner),
        )

    async def try_start_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        owner: str,
        lease: timedelta,
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> int | None:
        return await self._leases[running_loop()].try_start_step(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            step_type=check_key("step_type", step_type),
            owner=check_key("owner", owner),
            lease=check_lease("lease", lease),
            input_json=None if input_json is None else check_text("input_json", input_json),
            job_id=None if job_id is None else check_key("job_id", job_id, MAX_JOB_ID),
        )

    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        return await self._leases[running_loop()].renew_step_claim(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            owner=check_key("owner", owner),
            lease=check_lease("lease", lease),
        )

    async def renew_step_claims(
        self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta
    ) -> Sequence[bool]:
        return await self._leases[running_loop()].renew_step_claims(
            claims=check_claims(claims), lease=check_lease("lease", lease)
        )

    async def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        return await self._store[running_loop()].get_claimed_step_keys(run_id=check_id("run_id", run_id))

    async def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        return await self._store[running_loop()].get_step_claims(run_id=check_id("run_id", run_id))

    # Queues

    async def claim_next_steps(
        self,
        queues: Collection[str],
        *,
        lease: timedelta,
        limit: int = 1,
        worker: str | None = None,
    ) -> Sequence[ClaimedStep]:
        return await self._queues[running_loop()].claim_next_steps(
            queues=check_queues(queues),
            lease=check_lease("lease", lease),
            limit=check_int("limit", limit, 1, MAX_CLAIMS),
            worker=None if worker is None else check_key("worker", worker, MAX_JOB_ID),
        )

    async def advance_run(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus | str,
        *,
        attempt: int,
        owner: str | None = None,
        output_json: str | None = None,
        error_message: str | None = None,
        dispatch: Sequence[StepRequest] = (),
        complete_as: RunStatus | str | None = None,
        failed_as: RunStatus | str | None = RunStatus.FAILED,
    ) -> RunAdvance:
        return await self._queues[running_loop()].advance_run(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            status=check_final_outcome(status),
            attempt=check_int("attempt", attempt, 1, MAX_INT64),
            owner=None if owner is None else check_key("owner", owner),
            output_json=None if output_json is None else check_text("output_json", output_json),
            error_message=None if error_message is None else check_text("error_message", error_message),
            dispatch=check_requests(dispatch, advanced=step_key),
            complete_as=None if complete_as is None else check_run_outcome(complete_as, "complete_as"),
            failed_as=None if failed_as is None else check_run_outcome(failed_as, "failed_as"),
        )

    async def advance_runs(self, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        return await self._queues[running_loop()].advance_runs(steps=check_ended_steps(steps))

    async def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        return await self._queues[running_loop()].redispatch_step(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            queue=None if queue is None else check_key("queue", queue),
            priority=None if priority is None else check_priority("priority", priority),
            due_at=None if due_at is None else check_datetime("due_at", due_at),
        )

    async def get_queues(self) -> Sequence[QueueStatistics]:
        return await self._queues[running_loop()].get_queues()

    async def wait_for_steps(self, queues: Collection[str], *, timeout: timedelta) -> bool:
        return await self._watch[running_loop()].wait_for_steps(
            queues=check_queues(queues), timeout=check_timeout(timeout)
        )

    async def wait_for_run(self, run_id: UUID, *, timeout: timedelta) -> RunStatus | None:
        return await self._watch[running_loop()].wait_for_run(
            run_id=check_id("run_id", run_id), timeout=check_timeout(timeout)
        )

    # Controls

    async def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        await self._store[running_loop()].configure_run(
            run_id=check_id("run_id", run_id),
            flow_id=check_id("flow_id", flow_id),
            trigger_key=check_key("trigger_key", trigger_key),
            idempotency_key=None
            if idempotency_key is None
            else check_key("idempotency_key", idempotency_key),
            timeout_at=None if timeout_at is None else check_datetime("timeout_at", timeout_at),
        )

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        return await self._store[running_loop()].get_run_control(run_id=check_id("run_id", run_id))

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        return await self._store[running_loop()].get_run_controls(run_ids=check_ids("run_ids", run_ids))

    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        return await self._store[running_loop()].request_cancel(
            run_id=check_id("run_id", run_id), reason=None if reason is None else check_text("reason", reason)
        )

    async def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        return await self._store[running_loop()].mark_timed_out(
            run_id=check_id("run_id", run_id),
            reason=None if reason is None else check_text("reason", reason),
            as_of=None if as_of is None else check_datetime("as_of", as_of),
        )

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        return await self._store[running_loop()].find_run_id_by_idempotency_key(
            flow_id=check_id("flow_id", flow_id),
            trigger_key=check_key("trigger_key", trigger_key),
            idempotency_key=check_key("idempotency_key", idempotency_key),
        )

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        return await self._store[running_loop()].try_register_idempotency_key(
            flow_id=check_id("flow_id", flow_id),
            trigger_key=check_key("trigger_key", trigger_key),
            idempotency_key=check_key("idempotency_key", idempotency_key),
            run_id=check_id("run_id", run_id),
        )

    async def trigger_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        requests = check_requests(dispatch, allow_after=False)
        store = (self._queues if requests else self._trigger)[running_loop()]
        call = store.trigger_run if tags is None else self._tagged(store, "trigger_run", tags)
        return await call(
            flow_id=check_id("flow_id", flow_id),
            flow_name=check_key("flow_name", flow_name),
            run_id=check_id("run_id", run_id),
            trigger_key=check_key("trigger_key", trigger_key),
            trigger_data=None if trigger_data is None else check_text("trigger_data", trigger_data),
            job_id=None if job_id is None else check_key("job_id", job_id, MAX_JOB_ID),
            source_run_id=None if source_run_id is None else check_id("source_run_id", source_run_id),
            idempotency_key=None
            if idempotency_key is None
            else check_key("idempotency_key", idempotency_key),
            timeout_at=None if timeout_at is None else check_datetime("timeout_at", timeout_at),
            **({"dispatch": requests} if requests else _NOTHING),
        )

    async def get_runs_to_stop(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[FlowRunRecord]:
        return await self._deadlines[running_loop()].get_runs_to_stop(
            as_of=None if as_of is None else check_datetime("as_of", as_of), take=check_take(take)
        )

    async def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        return await self._deadlines[running_loop()].extend_deadline(
            run_id=check_id("run_id", run_id),
            timeout_at=check_datetime("timeout_at", timeout_at),
        )

    # Signals

    async def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        await self._store[running_loop()].register_waiter(
            run_id=check_id("run_id", run_id),
            step_key=check_key("step_key", step_key),
            signal_name=check_key("signal_name", signal_name),
            expires_at=None if expires_at is None else check_datetime("expires_at", expires_at),
        )

    async def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        checked = check_bool("buffer", buffer)
        return await (self._mailbox if checked else self._store)[running_loop()].deliver_signal(
            run_id=check_id("run_id", run_id),
            signal_name=check_key("signal_name", signal_name),
            payload_json=check_text("payload_json", payload_json),
            delivery_id=None if delivery_id is None else check_key("delivery_id", delivery_id),
            **({"buffer": True} if checked else _NOTHING),
        )

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        return await self._store[running_loop()].get_waiter(
            run_id=check_id("run_id", run_id), step_key=check_key("step_key", step_key)
        )

    async def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        return await self._store[running_loop()].remove_waiter(
            run_id=check_id("run_id", run_id), step_key=check_key("step_key", step_key)
        )

    async def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        return await self._waiters[running_loop()].expire_waiter(
            run_id=check_id("run_id", run_id), step_key=check_key("step_key", step_key)
        )

    async def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        return await self._waiters[running_loop()].get_waiters(run_id=check_id("run_id", run_id))

    async def get_buffered_signals(self, run_id: UUID) -> Sequence[BufferedSignal]:
        return await self._mailbox[running_loop()].get_buffered_signals(run_id=check_id("run_id", run_id))

    # Outputs and events

    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        await self._outputs[running_loop()].save_output(
            run_id=check_id("run_id", run_id),
            key=check_key("key", key),
            value_json=check_text("value_json", value_json),
        )

    async def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        await self._outputs[running_loop()].save_outputs(
            run_id=check_id("run_id", run_id), outputs=check_outputs(outputs)
        )

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        return await self._outputs[running_loop()].get_output(
            run_id=check_id("run_id", run_id), key=check_key("key", key)
        )

    async def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        return await self._outputs[running_loop()].get_outputs(
            run_id=check_id("run_id", run_id),
            prefix=check_prefix(prefix),
            after=None if after is None else check_key("after", after),
            take=None if take is None else check_take(take),
        )

    async def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        return await self._outputs[running_loop()].delete_outputs(
            run_id=check_id("run_id", run_id), prefix=check_prefix(prefix)
        )

    async def append_event(
        self,
        run_id: UUID,
        event_type: str,
        *,
        step_key: str | None = None,
        message: str | None = None,
    ) -> int:
        return await self._events[running_loop()].append_event(
            run_id=check_id("run_id", run_id),
            event_type=check_key("event_type", event_type),
            step_key=None if step_key is None else check_key("step_key", step_key),
            message=None if message is None else check_text("message", message),
        )

    async def get_run_events(
        self, run_id: UUID, *, after: int = 0, take: int = 200
    ) -> Sequence[FlowEventRecord]:
        return await self._events[running_loop()].get_run_events(
            run_id=check_id("run_id", run_id),
            after=check_int("after", after, 0, MAX_INT64),
            take=check_take(take),
        )

    # Retention and statistics

    async def export_run(self, run_id: UUID) -> RunArchive | None:
        return await self._transfer[running_loop()].export_run(run_id=check_id("run_id", run_id))

    async def import_run(self, archive: RunArchive) -> bool:
        return await self._transfer[running_loop()].import_run(archive=check_archive(archive))

    async def cleanup(self, cutoff: datetime) -> int:
        return await self._store[running_loop()].cleanup(cutoff=check_datetime("cutoff", cutoff))

    async def delete_run(self, run_id: UUID) -> bool:
        return await self._deletion[running_loop()].delete_run(run_id=check_id("run_id", run_id))

    async def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        return await self._dashboard[running_loop()].get_statistics(
            as_of=None if as_of is None else check_datetime("as_of", as_of)
        )

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity | str,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> Sequence[RunTimeseriesBucket]:
        checked = check_granularity(granularity)
        first, end = check_window(checked, check_datetime("since", since), check_datetime("until", until))
        return await self._dashboard[running_loop()].get_run_timeseries(
            granularity=checked,
            since=first,
            until=end,
            flow_id=None if flow_id is None else check_id("flow_id", flow_id),
        )


_open: WeakSet[ValidatedStore] = WeakSet()


def _disown_all() -> None:
    for store in list(_open):
        store._invalidate_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
