"""Starting, resuming and serving durable agent runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid5

from pydantic_ai.agent import AbstractAgent, AgentRunResult
from pydantic_ai.durable_exec import JSON_CODEC, external_event_scope, replay_scope
from pydantic_ai.messages import ModelMessage, UserContent
from pydantic_core import to_json

from flowstore import (
    Capability,
    ClaimedStep,
    ConflictError,
    FlowRunDetail,
    FlowStore,
    FlowStoreError,
    NotSupportedError,
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    SignalDeliveryStatus,
    StaleAttemptError,
    StepRequest,
    StepStatus,
    StoreClosedError,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_pydantic_ai.capability import FlowstoreDurability
from flowstore_pydantic_ai.errors import EventNotOpenError, RunFailedError, RunTakenOverError
from flowstore_pydantic_ai.events import Event, SignalWaiter, parse_token
from flowstore_pydantic_ai.execution import DRIVER, Execution, RunSuspendedError, current_execution, describe

NAMESPACE = UUID("b9a1c1a4-6f4e-4d53-9d52-0f7b2a4c7f10")
"""The namespace of the run ids that are made from the callers' names, and of flow ids."""
NEEDED = (
    Capability.LEASES,
    Capability.QUEUES,
    Capability.RECOVERY,
    Capability.TRIGGER,
    Capability.WAITERS,
    Capability.WATCH,
)
IDLE_TIMEOUT = timedelta(seconds=30)
"""How long an idle worker waits for a hint before it looks at its queues itself."""
PAUSE_SECONDS = 1.0
"""The longest pause before a run or a queue is looked at again without a hint."""

MAX_SHOWN = 1_000_000
"""Characters of an output that are stored with the driver."""

DepsT = TypeVar("DepsT")
OutputT = TypeVar("OutputT")
Prompt = str | Sequence[UserContent]
logger = logging.getLogger("flowstore_pydantic_ai")


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """The input of a run, as stored with its driver."""

    prompt: str | list[UserContent] | None
    message_history: list[ModelMessage] | None


class DurableRunner:
    """Runs agents that have the capability FlowstoreDurability on an open store.

    ``lease``: how long a run of a process that died stays unavailable to others. It is renewed while the
    run is executed, so it need not be as long as any operation takes.

    A ``run_id`` is a name of the caller's choice, of 1 to 1,024 characters, or a UUID.
    """

    def __init__(self, store: FlowStore, *, lease: timedelta = timedelta(seconds=30)) -> None:
        if lease < timedelta(milliseconds=100):
            raise ValueError(f"lease must be at least 0.1 seconds, not {lease.total_seconds()}")
        for capability in NEEDED:
            if capability not in store.capabilities:
                raise NotSupportedError(store.backend, capability, "DurableRunner")
        self._store = store
        self._lease = lease
        self._pause = min(PAUSE_SECONDS, lease.total_seconds() / 4)

    async def run(
        self,
        agent: AbstractAgent[DepsT, OutputT],
        prompt: Prompt | None = None,
        *,
        run_id: str | UUID,
        deps: DepsT = None,  # type: ignore[assignment]
        message_history: Sequence[ModelMessage] | None = None,
    ) -> AgentRunResult[OutputT]:
        """Start the run, or resume it if it exists, and return its result.

        One process at a time executes a run. While another one does, and while the run waits for an external
        event, the call waits; cancel it, or end the process, at any time. The result of a run that has ended
        is rebuilt from its steps: nothing is executed again.

        Raises what the agent raises, RunFailedError if the run had failed already, ValueError if the run was
        started with another agent or another input, or does not exist and has no input.
        """
        uuid = await self.start(agent, prompt, run_id=run_id, message_history=message_history)
        while True:
            status = await self._store.get_run_status(uuid)
            if status is not RunStatus.RUNNING:
                return await self._result(agent, uuid, deps)
            claim = await self._try_claim(uuid)
            if claim is None:
                await self._complete_ended_run(uuid)
                await self._store.wait_for_run(uuid, timeout=timedelta(seconds=self._pause))
                continue
            # Suspended, or taken over by another process: its result is the result of the run.
            with suppress(RunSuspendedError, RunTakenOverError):
                return await self._drive(agent, uuid, *claim, deps)

    async def start(
        self,
        agent: AbstractAgent[Any, Any],
        prompt: Prompt | None = None,
        *,
        run_id: str | UUID,
        message_history: Sequence[ModelMessage] | None = None,
    ) -> UUID:
        """Store a run for a worker, if it does not exist, and return its id in the store.

        Raises ValueError as ``run`` does.
        """
        queue = _queue(agent)
        uuid = _uuid(run_id)
        has_input = prompt is not None or message_history is not None
        value = RunInput(
            prompt=prompt if prompt is None or isinstance(prompt, str) else list(prompt),
            message_history=None if message_history is None else list(message_history),
        )
        input_json = json.dumps(JSON_CODEC.dump(RunInput, value))
        if has_input:
            request = StepRequest(step_key=DRIVER, step_type="agent", input_json=input_json, queue=queue)
            with suppress(RunAlreadyExistsError):
                await self._store.trigger_run(
                    uuid5(NAMESPACE, queue),
                    str(agent.name),
                    uuid,
                    "agent",
                    trigger_data=input_json,
                    job_id=str(run_id),
                    dispatch=[request],
                )
                return uuid
        run = await self._store.get_run(uuid)
        if run is None:
            raise ValueError(f"run_id: no run {str(run_id)!r} is stored; give a prompt to start it")
        if run.flow_id != uuid5(NAMESPACE, queue):
            raise ValueError(f"agent: run {str(run_id)!r} belongs to the agent {run.flow_name!r}")
        if has_input and not _same_input(run.trigger_data, input_json):
            raise ValueError(f"prompt: run {str(run_id)!r} was started with another input")
        return uuid

    async def work(
        self,
        agents: Sequence[AbstractAgent[DepsT, Any]],
        *,
        deps: DepsT = None,  # type: ignore[assignment]
        limit: int = 10,
    ) -> None:
        """Execute the runs of these agents for ever, at most ``limit`` at once.

        It takes new runs, runs whose process died, as soon as their lease has ended, and runs whose external
        event has arrived. An agent that fails ends its own run only. Cancel the call to end it: its runs are
        ready for others at once. Raises the errors of the store.
        """
        by_queue = {_queue(agent): agent for agent in agents}
        if not agents or len(by_queue) < len(agents):
            raise ValueError("agents must be one or more agents with different names")
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                if len(tasks) >= limit:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                claimed = await self._store.claim_next_steps(
                    by_queue, lease=self._lease, limit=limit - len(tasks)
                )
                for step in claimed:
                    task = asyncio.create_task(self._serve(by_queue[step.queue], step, deps))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                if not claimed and await self._store.wait_for_steps(by_queue, timeout=IDLE_TIMEOUT):
                    # A hint may be wrong, and must not become a busy loop.
                    await asyncio.sleep(0.01)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def resolve(self, token: str, payload: object) -> None:
        """Answer an external event, from any process; the run goes on with the JSON form of ``payload``.

        Repeating the same answer is a no-op. Raises EventNotOpenError.
        """
        await self._deliver(token, {"payload": json.loads(to_json(payload))})

    async def fail(self, token: str, reason: str) -> None:
        """End the wait for an external event with an ExternalEventError. Raises EventNotOpenError."""
        await self._deliver(token, {"error": reason})

    async def retry(self, run_id: str | UUID) -> None:
        """Reopen a failed run: ``run`` or a worker executes its failed operations again.

        Results that were recorded stay. Raises RunNotFoundError. Safe to repeat.
        """
        uuid = _uuid(run_id)
        run = await self._store.get_run_detail(uuid)
        if run is None:
            raise RunNotFoundError(uuid)
        driver = next((step for step in run.steps if step.step_key == DRIVER), None)
        if driver is None or driver.status is not StepStatus.FAILED:
            return
        request = StepRequest(
            step_key=DRIVER,
            step_type="agent",
            input_json=run.trigger_data,
            queue=_queue_name(run.flow_name),
        )
        with suppress(StaleAttemptError):  # Another call has reopened the run, and it has gone on.
            for step in run.steps:
                if step.step_key != DRIVER and step.status is StepStatus.FAILED:
                    await self._store.retry_step(uuid, step.step_key, attempt=step.attempt_count)
            # Last: the run is not resumed before all its failed operations are open.
            await self._store.retry_step(uuid, DRIVER, attempt=driver.attempt_count, dispatch=[request])

    async def _deliver(self, token: str, event: Event) -> None:
        run_id, signal_name = parse_token(token)
        payload_json = json.dumps(event)
        delivery_id = hashlib.sha256(f"{signal_name} {payload_json}".encode()).hexdigest()
        try:
            result = await self._store.deliver_signal(
                run_id, signal_name, payload_json, delivery_id=delivery_id
            )
        except RunNotFoundError as error:
            raise EventNotOpenError("the run of this token does not exist") from error
        if result.status is not SignalDeliveryStatus.DELIVERED:
            raise EventNotOpenError("the event of this token was resolved differently, or its wait is over")

    async def _try_claim(self, run_id: UUID) -> tuple[str, int] | None:
        """Claim the driver of a run that is ready: the owner and the attempt."""
        waiter = await self._store.get_waiter(run_id, DRIVER)
        if (
            waiter is not None
            and waiter.delivered_at is None
            and (waiter.expires_at is None or waiter.expires_at > datetime.now(UTC))
        ):
            return None
        owner = new_claim_token()
        try:
            attempt = await self._store.try_start_step(
                run_id, DRIVER, "agent", owner=owner, lease=self._lease
            )
        except asyncio.CancelledError:
            await self._store.release_step_claim(run_id, DRIVER, owner=owner)
            raise
        return None if attempt is None else (owner, attempt)

    async def _serve(self, agent: AbstractAgent[DepsT, Any], step: ClaimedStep, deps: DepsT) -> None:
        try:
            await self._drive(agent, step.run_id, step.owner, step.attempt, deps)
        except (RunSuspendedError, RunTakenOverError):
            pass  # The run is continued later, or by another process.
        except FlowStoreError:
            logger.exception("run %s stopped and will be resumed", step.run_id)
        except Exception:
            logger.exception("run %s failed", step.run_id)

    async def _result(
        self, agent: AbstractAgent[DepsT, OutputT], run_id: UUID, deps: DepsT
    ) -> AgentRunResult[OutputT]:
        """The result of a run that has ended."""
        run = await self._detail(run_id)
        if run.status is not RunStatus.SUCCEEDED:
            driver = next((step for step in run.steps if step.step_key == DRIVER), None)
            raise RunFailedError((driver and driver.error_message) or f"the run is {run.status}")
        execution = Execution(self._store, run, None, self._lease)
        return await _first(asyncio.create_task(_run_agent(agent, execution, deps)), execution.stopped)

    async def _drive(
        self, agent: AbstractAgent[DepsT, OutputT], run_id: UUID, owner: str, attempt: int, deps: DepsT
    ) -> AgentRunResult[OutputT]:
        """Execute a run as the owner of its driver, and record its end.

        Raises what the agent raises, RunSuspendedError, RunTakenOverError and the errors of the store.
        """
        renewing: asyncio.Task[Any] | None = None
        try:
            execution = Execution(self._store, await self._detail(run_id), owner, self._lease)
            renewing = asyncio.create_task(execution.renew_claims())
            running = asyncio.create_task(_run_agent(agent, execution, deps))
            try:
                result = await _first(running, execution.stopped, renewing)
            except (RunSuspendedError, RunTakenOverError, StoreUnavailableError, StoreClosedError):
                raise
            except Exception as error:
                message = describe(error)
                await self._end(run_id, owner, attempt, RunStatus.FAILED, error_message=message)
                raise
            # For people who look at the run: its result is rebuilt from its steps.
            output = to_json(result.output, serialize_unknown=True).decode()
            output_json = output if len(output) <= MAX_SHOWN else None
            await self._end(run_id, owner, attempt, RunStatus.SUCCEEDED, output_json=output_json)
            return result
        except (RunSuspendedError, asyncio.CancelledError):
            # Ready for every process at once, or when the event has arrived; otherwise, after the lease.
            with suppress(FlowStoreError):
                await self._store.reschedule_step(run_id, DRIVER, attempt=attempt, owner=owner)
            raise
        finally:
            if renewing is not None:
                renewing.cancel()
                await asyncio.gather(renewing, return_exceptions=True)

    async def _end(
        self,
        run_id: UUID,
        owner: str,
        attempt: int,
        status: RunStatus,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """Record the end of the driver and of its run."""
        try:
            advance = await self._store.advance_run(
                run_id,
                DRIVER,
                StepStatus.SUCCEEDED if status is RunStatus.SUCCEEDED else StepStatus.FAILED,
                attempt=attempt,
                owner=owner,
                output_json=output_json,
                error_message=error_message,
                complete_as=status,
                failed_as=None,
            )
        except ConflictError as error:
            raise RunTakenOverError(f"run {run_id} was continued by another process") from error
        if not advance.run_completed:
            # Steps that the agent has cancelled stay Pending.
            await self._store.complete_run(run_id, status)

    async def _complete_ended_run(self, run_id: UUID) -> None:
        """Complete a run whose process died between the two calls of _end."""
        driver = await self._store.get_step(run_id, DRIVER)
        if driver is not None and driver.status.is_terminal:
            await self._store.complete_run(run_id, RunStatus(driver.status))

    async def _detail(self, run_id: UUID) -> FlowRunDetail:
        run = await self._store.get_run_detail(run_id)
        if run is None:
            raise RunNotFoundError(run_id)
        return run


async def _run_agent(
    agent: AbstractAgent[DepsT, OutputT], execution: Execution, deps: DepsT
) -> AgentRunResult[OutputT]:
    """The agent's loop: recorded operations are replayed, others are executed."""
    value: RunInput = JSON_CODEC.load(RunInput, json.loads(execution.run.trigger_data or "null"))
    current_execution.set(execution)
    with (
        replay_scope(),
        external_event_scope(SignalWaiter(execution, str(agent.name))),
        # Events of parallel tool calls must reach a handler in the same order when they are replayed.
        agent.parallel_tool_call_execution_mode("parallel_ordered_events"),
    ):
        return await agent.run(value.prompt, message_history=value.message_history, deps=deps)


async def _first(running: asyncio.Task[OutputT], *reasons: asyncio.Future[Any]) -> OutputT:
    """The result of a task, or the error of the first reason to cancel it."""
    try:
        await asyncio.wait({running, *reasons}, return_when=asyncio.FIRST_COMPLETED)
        for reason in reasons:
            if reason.done() and not running.done():
                reason.result()  # Raises.
        return running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for reason in reasons:
            if reason.done():
                reason.exception()  # Marks it as seen.


def _queue(agent: AbstractAgent[Any, Any]) -> str:
    if not agent.name:
        raise ValueError("agent must have a name: it is part of what is stored")
    if FlowstoreDurability.from_agent(agent) is None:
        raise ValueError(f"agent {agent.name!r} must have the capability FlowstoreDurability")
    return _queue_name(agent.name)


def _queue_name(agent_name: str) -> str:
    return f"pydantic-ai {agent_name}"


def _uuid(run_id: str | UUID) -> UUID:
    return run_id if isinstance(run_id, UUID) else uuid5(NAMESPACE, run_id)


def _same_input(stored: str | None, given: str) -> bool:
    return stored is not None and json.loads(stored) == json.loads(given)
