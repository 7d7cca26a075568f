"""Mutants that hold less than they declare, or refuse in the wrong way what is beyond a limit."""

from __future__ import annotations

from typing import Any

from flowstore_core import LimitExceededError, StoreLimits, StoreUnavailableError
from flowstore_core.backend import SMALLEST_LIMITS
from flowstore_memory.store import SharedStore
from tests.limited_backend.plugin import LimitedStore
from tests.mutants import mutant

MAX_STEPS = SMALLEST_LIMITS.run_steps or 0


class _Limited(LimitedStore):
    """The correct store of these mutants."""

    limits = SMALLEST_LIMITS

    def _is_full(self, arguments: Any) -> bool:
        """Whether a call would add a step key beyond the limit."""
        run = self._runs.get(arguments["run_id"].int)
        return run is not None and len(run.steps) >= MAX_STEPS and arguments["step_key"] not in run.steps


@mutant("memory", "LIM-1")
class DeclaresLongerTextsThanItHolds(_Limited):
    """Declares texts of 128 KiB, and cuts the input of a step after 64 KiB."""

    limits = StoreLimits(text_bytes=131_072, run_steps=10_000, run_bytes=16_777_216)

    async def record_step_start(self, **given: Any) -> int:
        text = given["input_json"]
        return await super().record_step_start(**{**given, "input_json": text and text[:65_536]})


@mutant("memory", "LIM-1")
class CutsSignalsSilently(_Limited):
    """Stores a payload of the largest declared size without its last byte."""

    async def deliver_signal(self, **given: Any) -> Any:
        given["payload_json"] = given["payload_json"].encode()[:65_535].decode(errors="ignore")
        return await super().deliver_signal(**given)


@mutant("memory", "LIM-1")
class CutsDeliveryIds(_Limited):
    """Declares keys of 256 bytes, and remembers 254 bytes of a delivery_id."""

    async def deliver_signal(self, **given: Any) -> Any:
        if (name := given["delivery_id"]) is not None and len(name.encode()) > 254:
            given["delivery_id"] = None
        return await super().deliver_signal(**given)


@mutant("memory", "LIM-1")
class DeclaresLargerPagesThanItReturns(_Limited):
    """Declares pages of 200, and returns at most 100 events."""

    async def get_run_events(self, **given: Any) -> Any:
        return (await super().get_run_events(**given))[:100]


@mutant("memory", "LIM-2")
class DropsStepsBeyondTheLimit(_Limited):
    """Acknowledges a dispatch beyond the limit of a run, and does not store it."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        return self._is_full(given) or await super().try_record_dispatch(**given)


@mutant("memory", "LIM-2")
class LimitReachedTooEarly(_Limited):
    """Refuses the last of the declared steps."""

    async def record_step_start(self, **given: Any) -> int:
        run = self._runs.get(given["run_id"].int)
        if run is not None and len(run.steps) >= MAX_STEPS - 1 and given["step_key"] not in run.steps:
            raise LimitExceededError(self.backend, f"{MAX_STEPS:,} steps in a run")
        return await super().record_step_start(**given)


@mutant("memory", "LIM-2")
class LimitReportedAsUnavailable(_Limited):
    """Reports a full run as StoreUnavailableError, which invites a retry."""

    async def make_room(self, arguments: Any) -> None:
        try:
            await super().make_room(arguments)
        except LimitExceededError:
            raise StoreUnavailableError("the run is full") from None


@mutant("memory", "LIM-2")
class RefusedClaimStays(_Limited):
    """Raises LimitExceededError for a claim beyond the limit after it has stored it."""

    async def try_claim_step(self, **given: Any) -> bool:
        if self._is_full(given):
            await SharedStore.try_claim_step(self, **given)
            raise LimitExceededError(self.backend, f"{MAX_STEPS:,} steps in a run")
        return await super().try_claim_step(**given)


@mutant("memory", "LIM-2")
class FullRunCannotEnd(_Limited):
    """Refuses every write to a run that is at its limit, its completion included."""

    async def complete_run(self, **given: Any) -> bool:
        run = self._runs.get(given["run_id"].int)
        if run is not None and len(run.steps) >= MAX_STEPS:
            raise LimitExceededError(self.backend, f"{MAX_STEPS:,} steps in a run")
        return await super().complete_run(**given)


@mutant("memory", "LIM-2")
class DropsTheOldestOutputs(_Limited):
    """Makes room in a full run by deleting its first output."""

    async def save_output(self, **given: Any) -> None:
        try:
            await super().save_output(**given)
        except LimitExceededError:
            first = next(iter(await self.get_outputs(run_id=given["run_id"], prefix="", after=None, take=1)))
            await self.delete_outputs(run_id=given["run_id"], prefix=first)
            await super().save_output(**given)
