"""External events: the run waits without a process, as a waiter of the driver in the store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TypedDict, cast
from uuid import UUID

from pydantic import JsonValue
from pydantic_ai.durable_exec import ExternalEventError, ExternalEventWaiter

from flowstore import FlowSignalWaiter, FlowStoreError
from flowstore_pydantic_ai.errors import EventNotOpenError
from flowstore_pydantic_ai.execution import DRIVER, Execution


class Event(TypedDict, total=False):
    """The payload of a signal, and the output of the step of a wait."""

    payload: JsonValue
    error: str


class SignalWaiter(ExternalEventWaiter):
    """Waits for external events of one execution, one at a time.

    A waiter of the driver holds the token. Until ``ask`` has been recorded the waiter expires with the lease,
    so a run whose process died before that is resumed and asks; afterwards it keeps the run from being
    resumed until the event arrives or the time-out passes.
    """

    def __init__(self, execution: Execution, agent_name: str) -> None:
        self._execution = execution
        self._agent_name = agent_name
        self._lock = asyncio.Lock()

    async def wait(
        self, name: str, *, ask: Callable[[str], Awaitable[JsonValue]], timeout: timedelta | None
    ) -> JsonValue:
        """See ExternalEventWaiter."""
        execution = self._execution
        async with self._lock:
            key = execution.new_key(f"{self._agent_name}__external_event.{name}")
            ended: Event = {}
            if not execution.is_recorded(key):
                try:
                    ended = await self._wait(key, ask, timeout)
                except FlowStoreError as error:
                    await execution.stop(error)

            async def event() -> object:
                return ended

            recorded = cast(Event, await execution.step(key, "external_event", event))
        if "error" in recorded:
            raise ExternalEventError(recorded["error"])
        return recorded["payload"]

    async def _wait(
        self, key: str, ask: Callable[[str], Awaitable[JsonValue]], timeout: timedelta | None
    ) -> Event:
        store, run_id = self._execution.store, self._execution.run.run_id
        waiter = await self._waiter(key)
        signal_name = waiter.signal_name
        answer = await self._execution.step(
            f"{key} ask", "external_event.ask", lambda: ask(f"{run_id.hex}.{signal_name}")
        )
        if answer is not None:
            # Before the result is recorded: a waiter that stays would keep the run from being resumed.
            await store.remove_waiter(run_id, DRIVER)
            return {"payload": cast(JsonValue, answer)}
        if waiter.expired_at is None:
            deadline = None if timeout is None else waiter.created_at + timeout
            await store.register_waiter(run_id, DRIVER, signal_name, expires_at=deadline)
        found = await store.expire_waiter(run_id, DRIVER)
        if found is not None and found.payload_json is not None:
            return cast(Event, json.loads(found.payload_json))
        if found is not None and found.expired_at is not None:
            return {"error": f"No resolution arrived within {timeout}."}
        return await self._execution.suspend()

    async def _waiter(self, key: str) -> FlowSignalWaiter:
        """The waiter of this wait, with its token."""
        store, run_id = self._execution.store, self._execution.run.run_id
        prefix = hashlib.sha256(key.encode()).hexdigest()[:16] + "."
        waiter = await store.get_waiter(run_id, DRIVER)
        if waiter is not None and waiter.signal_name.startswith(prefix):
            return waiter
        # The waiter of an earlier wait has served its purpose.
        await store.remove_waiter(run_id, DRIVER)
        expires_at = datetime.now(UTC) + self._execution.lease
        await store.register_waiter(run_id, DRIVER, prefix + secrets.token_urlsafe(24), expires_at=expires_at)
        waiter = await store.get_waiter(run_id, DRIVER)
        assert waiter is not None
        return waiter


def parse_token(token: str) -> tuple[UUID, str]:
    """The run and the signal name of a token. Raises EventNotOpenError."""
    run_id, _, signal_name = token.partition(".")
    try:
        if signal_name:
            return UUID(run_id), signal_name
    except ValueError:
        pass  # Every malformed token gets the same error.
    raise EventNotOpenError("token is not one that a flowstore run handed out")
