"""Clients that work on a store together, repeat what failed, and write down what they were told.

The clients of a group meet over each run: all of them trigger it, dispatch and claim each of its steps,
signal it, and complete it. One of them may win each time, whatever faults are injected meanwhile. Calls
that raised are repeated with the same token, as docs/using-it-in-an-engine.md says.
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

from flowstore_chaos.books import Books, Entry
from flowstore_chaos.tally import Tally
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
"""No claim may run out here: that a step has two winners must be the store's fault."""
PAUSE_SECONDS = 0.02


class GaveUpError(Exception):
    """A call had no right answer, which was counted; the run's entry stays as it is."""


@dataclass(frozen=True, slots=True)
class Told:
    """An answer, and whether an attempt before it ended with OutcomeUnknownError."""

    answer: Any
    unknown: bool


class Clients:
    """A group of clients, each with a store of its own or sharing one."""

    def __init__(
        self, stores: Sequence[Any], tally: Tally, rng: random.Random, *, patience: float = 60.0
    ) -> None:
        """``patience`` is how many seconds a call is repeated; a longer outage is counted as wrong."""
        self.stores = stores
        self.tally = tally
        self.books = Books()
        self.refused = 0
        """Calls that ended with StoreUnavailableError, OutcomeUnknownError included."""
        self._rng = rng
        self._patience = patience

    async def work(self, until: Callable[[], bool], *, groups: int = 4) -> None:
        """Go through run after run, so many at once, until told to stop; the runs begun are ended."""

        async def group() -> None:
            while not until():
                try:
                    await self.one_run()
                except GaveUpError:
                    # Counted where it came about. The next run may fare better.
                    await asyncio.sleep(PAUSE_SECONDS)

        await asyncio.gather(*(group() for _ in range(groups)))

    async def progress(self, calls: int, seconds: float) -> bool:
        """Wait until so many more calls are answered, at most so long; whether any was."""
        before, until = self.tally.operations, time.monotonic() + seconds
        while True:
            if self.tally.operations >= before + calls or time.monotonic() > until:
                return self.tally.operations > before
            await asyncio.sleep(0.005)

    async def one_run(self) -> Entry:
        """One run from its trigger to its end, all clients at every call of it."""
        entry = Entry(idempotency_key=new_claim_token())
        self.books.entries.append(entry)
        run_id = await self._trigger(entry)
        for key in self._rng.sample(STEPS, len(STEPS)):
            await self._step(entry, run_id, key)
        await self._signal(entry, run_id)
        await self._note(entry, run_id)
        await self._complete(entry, run_id)
        return entry

    async def _trigger(self, entry: Entry) -> UUID:
        told = await self._all(
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
        run_ids = {one.answer.run.run_id for one in told}
        if len(run_ids) > 1:
            self.tally.repeat(f"one idempotency key started {len(run_ids)} runs")
        self._one_winner("trigger_run", [one.answer.created for one in told], told)
        entry.flow_id, entry.run_id = FLOW, told[0].answer.run.run_id
        return entry.run_id

    async def _step(self, entry: Entry, run_id: UUID, key: str) -> None:
        step = {"run_id": run_id, "step_key": key}
        told = await self._all(lambda _: step, "try_record_dispatch")
        self._one_winner("try_record_dispatch", [one.answer for one in told], told)
        tokens = [new_claim_token() for _ in self.stores]
        # With a token the answer is exact: no lost reply may change it.
        told = await self._all(lambda n: {**step, "owner": tokens[n], "lease": LEASE}, "try_claim_step")
        winners = [number for number, one in enumerate(told) if one.answer]
        self._one_winner("try_claim_step", [one.answer for one in told], ())
        await asyncio.gather(*(self._execute(entry, step, tokens[n], n) for n in winners))

    async def _execute(self, entry: Entry, step: dict[str, Any], token: str, number: int) -> None:
        key = step["step_key"]
        entry.claims[key] = token
        attempt = await self._call(
            number, "record_step_start", {**step, "step_type": "python", "owner": token}
        )
        if attempt.answer != 1:
            self.tally.repeat(f"the only start of step {key!r} is attempt {attempt.answer}")
        entry.effects[key] = entry.effects.get(key, 0) + 1
        output = f'"{token}"'
        await self._call(
            number,
            "record_step_complete",
            {
                **step,
                "status": StepStatus.SUCCEEDED,
                "output_json": output,
                "attempt": attempt.answer,
            },
        )
        entry.outputs[key] = output

    async def _signal(self, entry: Entry, run_id: UUID) -> None:
        waiting = {"run_id": run_id, "step_key": WAITING}
        await self._call(0, "register_waiter", {**waiting, "signal_name": "go"})
        tokens = [new_claim_token() for _ in self.stores]
        told = await self._all(
            lambda n: {
                "run_id": run_id,
                "signal_name": "go",
                "payload_json": f'"{tokens[n]}"',
                "delivery_id": tokens[n],
            },
            "deliver_signal",
        )
        results: list[SignalDeliveryResult] = [one.answer for one in told]
        for number, result in enumerate(results):
            if result.status not in DELIVERED or result.step_key != WAITING:
                self.tally.mistrust(f"a signal for a step that waits was answered {result.status}")
            elif result.status is SignalDeliveryStatus.DELIVERED:
                entry.delivered = f'"{tokens[number]}"'
        self._one_winner("deliver_signal", [r.status is SignalDeliveryStatus.DELIVERED for r in results], ())

    async def _note(self, entry: Entry, run_id: UUID) -> None:
        values = {f"value-{number}": f'"{new_claim_token()}"' for number in range(len(self.stores))}
        keys = list(values)
        await self._all(
            lambda n: {"run_id": run_id, "key": keys[n], "value_json": values[keys[n]]}, "save_output"
        )
        entry.values.update(values)
        messages = [new_claim_token() for _ in self.stores]
        told = await self._all(
            lambda n: {"run_id": run_id, "event_type": "note", "message": messages[n]}, "append_event"
        )
        # append_event appends again when it is repeated after an unknown outcome, and says so.
        entry.events.update(
            {message: 1 + one.unknown * 1000 for message, one in zip(messages, told, strict=True)}
        )

    async def _complete(self, entry: Entry, run_id: UUID) -> None:
        told = await self._all(lambda _: {"run_id": run_id, "status": RunStatus.SUCCEEDED}, "complete_run")
        self._one_winner("complete_run", [one.answer for one in told], told)
        entry.completed = True

    def _one_winner(self, method: str, won: Sequence[bool], told: Sequence[Told]) -> None:
        """Exactly one is right; none only where an unknown outcome of ``told`` may have been the winner."""
        count = sum(won)
        for _ in range(count - 1):
            self.tally.repeat(f"{method} was won by {count} of {len(won)} clients")
        if not count and not any(one.unknown for one in told):
            self.tally.mistrust(f"{method} was won by none of {len(won)} clients")

    async def _all(self, arguments: Callable[[int], dict[str, Any]], method: str) -> list[Told]:
        told: list[Told] = []
        gathered = await asyncio.gather(
            *(self._call(number, method, arguments(number)) for number in range(len(self.stores))),
            # So that no call goes on alone when another gave up.
            return_exceptions=True,
        )
        for one in gathered:
            if isinstance(one, BaseException):
                raise one
            told.append(one)
        return told

    async def _call(self, number: int, method: str, arguments: dict[str, Any]) -> Told:
        """Call until there is an answer."""
        store: FlowStore = self.stores[number]
        until = time.monotonic() + self._patience
        unknown = False
        while True:
            try:
                answer = await getattr(store, method)(**arguments)
            except StoreUnavailableError as error:
                self.refused += 1
                unknown = unknown or isinstance(error, OutcomeUnknownError)
                if time.monotonic() > until:
                    self.tally.mistrust(f"{method} found no store for {self._patience:.0f} s")
                    raise GaveUpError(method) from error
                await asyncio.sleep(PAUSE_SECONDS)
            except FlowStoreError as error:
                # Everything that this call needs was acknowledged before.
                self.tally.lose(f"{method} raised {type(error).__name__}: {error}")
                raise GaveUpError(method) from error
            except Exception as error:
                self.tally.mistrust(
                    f"{method} raised {type(error).__name__}, which is none of the contract's"
                )
                raise GaveUpError(method) from error
            else:
                self.tally.operations += 1
                return Told(answer, unknown)
