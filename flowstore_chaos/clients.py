"""Clients that compete for the same runs, retry failed calls, and record acknowledged operations.

All clients of a group trigger each run, dispatch and claim each of its steps, signal it and complete it.
Exactly one client may win each time, under any faults. Failed calls are retried with the same token, as
described in docs/using-it-in-an-engine.md.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_chaos.counts import Counts
from flowstore_chaos.ledger import Ledger, LedgerEntry
from flowstore_core import (
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
    new_run_id,
)

FLOW = UUID("5c3a7c1e-8a42-4f0f-9d8e-0d7b6f1f2a11")
STEPS = ("fetch", "count", "publish")
WAITING = "approve"
DELIVERED = (SignalDeliveryStatus.DELIVERED, SignalDeliveryStatus.ALREADY_DELIVERED)
LEASE = timedelta(hours=1)
"""Long enough never to expire, so that two winners of a step are a defect of the store."""
RETRY_INTERVAL = 0.02


class RunAbandonedError(Exception):
    """The run is abandoned after a call failed; the failure was counted."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A result, and whether an earlier try ended with OutcomeUnknownError."""

    value: Any
    unknown: bool


class ClientGroup:
    """A group of clients; each has its own store, or they share one."""

    def __init__(
        self, stores: Sequence[Any], counts: Counts, rng: random.Random, *, retry_timeout: float = 60.0
    ) -> None:
        """``retry_timeout``: seconds for which a call is retried; a longer outage counts as wrong."""
        self.stores = stores
        self.counts = counts
        self.ledger = Ledger()
        self.refused = 0
        """Number of calls that raised StoreUnavailableError, including OutcomeUnknownError."""
        self._rng = rng
        self._retry_timeout = retry_timeout

    async def run(self, until: Callable[[], bool], *, groups: int = 4) -> None:
        """Execute runs, ``groups`` concurrently, until ``until`` returns True; started runs are finished."""

        async def group() -> None:
            while not until():
                try:
                    await self.execute_run()
                except RunAbandonedError:
                    # Counted by the failed call. Continue with the next run.
                    await asyncio.sleep(RETRY_INTERVAL)

        await asyncio.gather(*(group() for _ in range(groups)))

    async def wait_for_progress(self, calls: int, seconds: float) -> bool:
        """Wait for ``calls`` more results, at most ``seconds``. True if there was any."""
        before, until = self.counts.operations, time.monotonic() + seconds
        while True:
            if self.counts.operations >= before + calls or time.monotonic() > until:
                return self.counts.operations > before
            await asyncio.sleep(0.005)

    async def execute_run(self) -> LedgerEntry:
        """Execute one run from trigger to completion; all clients make each call."""
        entry = LedgerEntry(idempotency_key=new_claim_token())
        self.ledger.entries.append(entry)
        run_id = await self._trigger(entry)
        for key in self._rng.sample(STEPS, len(STEPS)):
            await self._step(entry, run_id, key)
        await self._signal(entry, run_id)
        await self._signal_early(entry, run_id)
        await self._write_outputs_and_events(entry, run_id)
        await self._complete(entry, run_id)
        return entry

    async def _trigger(self, entry: LedgerEntry) -> UUID:
        replies = await self._call_all(
            lambda _: {
                "flow_id": FLOW,
                "flow_name": "chaos",
                "run_id": new_run_id(),
                "trigger_key": "manual",
                "idempotency_key": entry.idempotency_key,
                "trigger_data": entry.idempotency_key,
            },
            "trigger_run",
        )
        run_ids = {one.value.run.run_id for one in replies}
        if len(run_ids) > 1:
            self.counts.count_duplicate(f"one idempotency key started {len(run_ids)} runs")
        self._expect_one_winner("trigger_run", [one.value.created for one in replies], replies)
        entry.flow_id, entry.run_id = FLOW, replies[0].value.run.run_id
        return entry.run_id

    async def _step(self, entry: LedgerEntry, run_id: UUID, key: str) -> None:
        step = {"run_id": run_id, "step_key": key}
        replies = await self._call_all(lambda _: step, "try_record_dispatch")
        self._expect_one_winner("try_record_dispatch", [one.value for one in replies], replies)
        tokens = [new_claim_token() for _ in self.stores]
        # With a token the result is exact, even after a lost reply.
        replies = await self._call_all(
            lambda n: {**step, "owner": tokens[n], "lease": LEASE}, "try_claim_step"
        )
        winners = [number for number, one in enumerate(replies) if one.value]
        self._expect_one_winner("try_claim_step", [one.value for one in replies], ())
        await asyncio.gather(*(self._execute(entry, step, tokens[n], n) for n in winners))

    async def _execute(self, entry: LedgerEntry, step: dict[str, Any], token: str, number: int) -> None:
        key = step["step_key"]
        entry.claims[key] = token
        attempt = await self._call(
            number, "record_step_start", {**step, "step_type": "python", "owner": token}
        )
        if attempt.value != 1:
            self.counts.count_duplicate(f"the first start of step {key!r} is attempt {attempt.value}")
        entry.effects[key] = entry.effects.get(key, 0) + 1
        output = f'"{token}"'
        await self._call(
            number,
            "record_step_complete",
            {
                **step,
                "status": StepStatus.SUCCEEDED,
                "output_json": output,
                "attempt": attempt.value,
            },
        )
        entry.outputs[key] = output

    async def _signal(self, entry: LedgerEntry, run_id: UUID) -> None:
        waiting = {"run_id": run_id, "step_key": WAITING}
        await self._call(0, "register_waiter", {**waiting, "signal_name": "go"})
        tokens = [new_claim_token() for _ in self.stores]
        replies = await self._call_all(
            lambda n: {
                "run_id": run_id,
                "signal_name": "go",
                "payload_json": f'"{tokens[n]}"',
                "delivery_id": tokens[n],
            },
            "deliver_signal",
        )
        results: list[SignalDeliveryResult] = [one.value for one in replies]
        for number, result in enumerate(results):
            if result.status not in DELIVERED or result.step_key != WAITING:
                self.counts.count_wrong(f"a signal for a waiting step returned {result.status}")
            elif result.status is SignalDeliveryStatus.DELIVERED:
                entry.delivered = f'"{tokens[number]}"'
        self._expect_one_winner(
            "deliver_signal", [r.status is SignalDeliveryStatus.DELIVERED for r in results], ()
        )

    async def _signal_early(self, entry: LedgerEntry, run_id: UUID) -> None:
        """Each client sends a signal before its waiter; then one waiter for each signal is registered."""
        payloads = [f'"{new_claim_token()}"' for _ in self.stores]
        signal = {"run_id": run_id, "signal_name": "early", "buffer": True}
        replies = await self._call_all(
            lambda n: {**signal, "payload_json": payloads[n], "delivery_id": payloads[n]}, "deliver_signal"
        )
        for reply in replies:
            if reply.value.status is not SignalDeliveryStatus.BUFFERED:
                self.counts.count_wrong(f"a signal before its waiter returned {reply.value.status}")
        await self._call_all(
            lambda n: {"run_id": run_id, "step_key": f"early {n}", "signal_name": "early"}, "register_waiter"
        )
        entry.buffered.update(payloads)

    async def _write_outputs_and_events(self, entry: LedgerEntry, run_id: UUID) -> None:
        values = {f"value-{number}": f'"{new_claim_token()}"' for number in range(len(self.stores))}
        keys = list(values)
        await self._call_all(
            lambda n: {"run_id": run_id, "key": keys[n], "value_json": values[keys[n]]}, "save_output"
        )
        entry.values.update(values)
        messages = [new_claim_token() for _ in self.stores]
        replies = await self._call_all(
            lambda n: {"run_id": run_id, "event_type": "note", "message": messages[n]}, "append_event"
        )
        # append_event documents duplicates: a retry after an unknown outcome appends again.
        entry.events.update(
            {message: 1 + one.unknown * 1000 for message, one in zip(messages, replies, strict=True)}
        )

    async def _complete(self, entry: LedgerEntry, run_id: UUID) -> None:
        replies = await self._call_all(
            lambda _: {"run_id": run_id, "status": RunStatus.SUCCEEDED}, "complete_run"
        )
        self._expect_one_winner("complete_run", [one.value for one in replies], replies)
        entry.completed = True

    def _expect_one_winner(self, method: str, won: Sequence[bool], replies: Sequence[Reply]) -> None:
        """Check for exactly one winner; none is allowed if a call of unknown outcome may have won."""
        count = sum(won)
        for _ in range(count - 1):
            self.counts.count_duplicate(f"{method} was won by {count} of {len(won)} clients")
        if not count and not any(one.unknown for one in replies):
            self.counts.count_wrong(f"{method} was won by none of {len(won)} clients")

    async def _call_all(self, arguments: Callable[[int], dict[str, Any]], method: str) -> list[Reply]:
        replies: list[Reply] = []
        gathered = await asyncio.gather(
            *(self._call(number, method, arguments(number)) for number in range(len(self.stores))),
            # Wait for all calls, also when one fails.
            return_exceptions=True,
        )
        for one in gathered:
            if isinstance(one, BaseException):
                raise one
            replies.append(one)
        return replies

    async def _call(self, number: int, method: str, arguments: dict[str, Any]) -> Reply:
        """Call a method and retry until it returns a result."""
        store: FlowStore = self.stores[number]
        until = time.monotonic() + self._retry_timeout
        unknown = False
        while True:
            try:
                value = await getattr(store, method)(**arguments)
            except StoreUnavailableError as error:
                self.refused += 1
                unknown = unknown or isinstance(error, OutcomeUnknownError)
                if time.monotonic() > until:
                    self.counts.count_wrong(f"{method} was unavailable for {self._retry_timeout:.0f} s")
                    raise RunAbandonedError(method) from error
                await asyncio.sleep(RETRY_INTERVAL)
            except FlowStoreError as error:
                # All prerequisites of this call were acknowledged, so one of them is lost.
                self.counts.count_lost(f"{method} raised {type(error).__name__}: {error}")
                raise RunAbandonedError(method) from error
            except Exception as error:
                self.counts.count_wrong(
                    f"{method} raised {type(error).__name__}, which is not an error of the contract"
                )
                raise RunAbandonedError(method) from error
            else:
                self.counts.operations += 1
                return Reply(value, unknown)
