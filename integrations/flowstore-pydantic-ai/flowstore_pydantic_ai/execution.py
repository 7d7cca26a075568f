"""One execution of a run by one process: it replays the recorded steps and executes the others.

The step DRIVER stands for the agent loop. The process that holds its claim executes the run; every operation
of the agent is a step of its own: one call of the store claims and starts it, one records its result.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Never

from pydantic_ai.durable_exec import record_durable_unit

from flowstore import (
    ConflictError,
    FlowRunDetail,
    FlowStepRecord,
    FlowStore,
    FlowStoreError,
    InvalidArgumentError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_pydantic_ai.errors import OperationFailedError, RunFailedError, RunTakenOverError

DRIVER = "agent"
"""The key of the step that stands for the agent loop."""
MAX_NAME = 180
"""Longer names of steps end with a hash; a key has at most 256 characters."""
MAX_MESSAGE = 10_000
"""Characters of an error message that are stored."""
MAX_RENEWED = 1000
"""Claims that are renewed with one call."""

current_execution: ContextVar[Execution | None] = ContextVar(
    "flowstore_pydantic_ai.current_execution", default=None
)
"""The execution of the run whose code this is; None inside the steps of the run."""


def describe(error: Exception) -> str:
    """An error as the store accepts it."""
    text = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


class RunSuspendedError(Exception):
    """The run waits for an external event, and needs no process until then."""


class Execution:
    """The steps of a run, as the holder of the claim on its driver sees them.

    With ``owner`` None it replays only: an operation without a recorded result raises RunFailedError.
    """

    def __init__(self, store: FlowStore, run: FlowRunDetail, owner: str | None, lease: timedelta) -> None:
        self.store = store
        self.run = run
        self.lease = lease
        self.stopped: asyncio.Future[Never] = asyncio.get_running_loop().create_future()
        """Gets the exception that ends this execution before the agent has ended."""
        self.is_idle = asyncio.Event()
        """Set while no step is being executed."""
        self.is_idle.set()
        self._recorded: dict[str, FlowStepRecord] = {step.step_key: step for step in run.steps}
        self._can_execute = owner is not None
        self._claims: dict[str, str] = {} if owner is None else {DRIVER: owner}
        self._executing = 0
        self._names: dict[str, int] = {}
        self._agent_runs = 0

    def next_agent_run_id(self) -> str:
        """The id of the next agent run: the run's own id, then with numbers."""
        number, self._agent_runs = self._agent_runs, self._agent_runs + 1
        return f"{self.run.run_id}:{number}" if number else str(self.run.run_id)

    def new_key(self, name: str) -> str:
        """The key of the next step with this name; a replay gets the same keys in the same order."""
        if len(name) > MAX_NAME:
            name = f"{name[: MAX_NAME - 33]} {hashlib.sha256(name.encode()).hexdigest()[:32]}"
        self._names[name] = self._names.get(name, 0) + 1
        return f"{name} #{self._names[name]}"

    def is_recorded(self, key: str) -> bool:
        """Whether the step had ended when this execution began."""
        step = self._recorded.get(key)
        return step is not None and step.status.is_terminal

    async def step(self, key: str, step_type: str, body: Callable[[], Awaitable[object]]) -> object:
        """The recorded result of a step, or else the result of ``body``, recorded before it is returned.

        Raises the error of ``body``, recorded as well, and OperationFailedError where it is replayed. An
        error of the store stops the execution and is not seen by the agent.
        """
        if self.is_recorded(key):
            return _replay(self._recorded[key])
        if not self._can_execute:
            await self.stop(RunFailedError(f"the agent's code has changed: {key!r} has no recorded result"))
        owner, attempt = new_claim_token(), None
        self._executing += 1
        self.is_idle.clear()
        try:
            try:
                attempt = await self._start(key, step_type, owner)
            except InvalidArgumentError:
                raise  # The agent's names do not fit into the store: its run fails.
            except FlowStoreError as error:
                await self.stop(error)
            if attempt is None:
                return _replay(self._recorded[key])
            self._claims[key] = owner
            return await self._execute(key, attempt, owner, body)
        except asyncio.CancelledError:
            await self._give_back(key, attempt, owner)
            raise
        finally:
            self._claims.pop(key, None)
            self._executing -= 1
            if not self._executing:
                self.is_idle.set()

    async def _start(self, key: str, step_type: str, owner: str) -> int | None:
        """Claim and start a step, after the lease of a claim that a dead process left.

        The number of the attempt; None, and the step is among the recorded ones, if it has ended.
        """
        while True:
            attempt = await self.store.try_start_step(
                self.run.run_id, key, step_type, owner=owner, lease=self.lease
            )
            if attempt is not None:
                return attempt
            step = await self.store.get_step(self.run.run_id, key)
            if step is not None and step.status.is_terminal:
                self._recorded[key] = step
                return None
            status = await self.store.get_run_status(self.run.run_id)
            if status is not RunStatus.RUNNING:
                await self.stop(RunFailedError(f"the run is {status or 'deleted'}"))
            await asyncio.sleep(min(1, self.lease.total_seconds() / 4))

    async def _execute(
        self, key: str, attempt: int, owner: str, body: Callable[[], Awaitable[object]]
    ) -> object:
        try:
            # Durable agents that a step runs are part of this step.
            token = current_execution.set(None)
            try:
                output = json.dumps(await body())
            finally:
                current_execution.reset(token)
            await self._record(key, attempt, owner, StepStatus.SUCCEEDED, output_json=output)
        except Exception as error:  # Also a result that is too large for the store.
            await self._record(key, attempt, owner, StepStatus.FAILED, error_message=describe(error))
            raise
        # As a replay returns it.
        return json.loads(output)

    async def _record(
        self,
        key: str,
        attempt: int,
        owner: str,
        status: StepStatus,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """Record the outcome of a step, also when this task is cancelled meanwhile."""
        recording = asyncio.ensure_future(
            self.store.record_step_complete(
                self.run.run_id,
                key,
                status,
                output_json=output_json,
                error_message=error_message,
                attempt=attempt,
                owner=owner,
            )
        )
        try:
            await asyncio.shield(recording)
        except asyncio.CancelledError:
            with suppress(FlowStoreError):
                await recording
            raise
        except InvalidArgumentError:
            raise
        except FlowStoreError as error:
            await self.stop(error)
        record_durable_unit(executed=True)

    async def _give_back(self, key: str, attempt: int | None, owner: str) -> None:
        """Let another process execute a cancelled step at once; without this, after the lease."""
        if attempt is not None:
            with suppress(FlowStoreError):
                await self.store.record_step_complete(
                    self.run.run_id, key, StepStatus.PENDING, attempt=attempt, owner=owner
                )
        with suppress(FlowStoreError):
            await self.store.release_step_claim(self.run.run_id, key, owner=owner)

    async def stop(self, error: Exception) -> Never:
        """End this execution with an error that the agent does not see: its task is cancelled."""
        if isinstance(error, ConflictError):
            error = RunTakenOverError(f"run {self.run.run_id} is continued by another process: {error}")
        if not self.stopped.done():
            self.stopped.set_exception(error)
        while True:
            await asyncio.Event().wait()

    async def suspend(self) -> Never:
        """End this execution until the driver's waiter is delivered or expires."""
        # Steps that are being executed at the same time are finished first.
        while not self.is_idle.is_set():
            await self.is_idle.wait()
        await self.stop(RunSuspendedError())

    async def renew_claims(self) -> Never:
        """Renew the claims of driver and steps in progress; raises RunTakenOverError when one is lost."""
        seconds = self.lease.total_seconds()
        deadline = time.monotonic() + seconds
        while True:
            await asyncio.sleep(min(seconds / 4, deadline - time.monotonic()))
            claims = [(self.run.run_id, key, owner) for key, owner in self._claims.items()]
            now = time.monotonic()
            try:
                async with asyncio.timeout(deadline - now):
                    held = [
                        one
                        for first in range(0, len(claims), MAX_RENEWED)
                        for one in await self.store.renew_step_claims(
                            claims[first : first + MAX_RENEWED], self.lease
                        )
                    ]
            except (StoreUnavailableError, TimeoutError) as error:
                if time.monotonic() < deadline:
                    continue
                raise RunTakenOverError(f"the lease of run {self.run.run_id} could not be renewed") from error
            deadline = now + seconds
            for (_, key, owner), is_held in zip(claims, held, strict=True):
                # The claim of a step that ended meanwhile does not matter.
                if not is_held and self._claims.get(key) == owner:
                    raise RunTakenOverError(f"the claim on {key!r} of run {self.run.run_id} was lost")


def _replay(step: FlowStepRecord) -> object:
    record_durable_unit(executed=False)
    if step.status is not StepStatus.SUCCEEDED:
        raise OperationFailedError(f"{step.step_key}: {step.error_message or step.status}")
    return json.loads(step.output_json or "null")
