"""Leases, deadlines, retention, series and order at the edges of calendars and of number formats.

Backends store datetimes as seconds, milliseconds, floats, text or local time. Each of these is wrong at some
of the moments below, or while the local time zone of the process changes to or from daylight-saving time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    TICK,
    new_id,
    new_store,
    require_clock,
)
from flowstore_conformance.context import CheckContext, ContractViolation, Profile, VirtualClock
from flowstore_conformance.diffing import expected_and_got
from flowstore_conformance.execution import execute, is_foreign
from flowstore_conformance.history import Call, Outcome, Raised, Returned, comparable
from flowstore_conformance.model import Model
from flowstore_conformance.registry import check
from flowstore_core import Capability, FlowStore, FlowStoreError, RunPosition, RunStatus
from flowstore_core.operations import OPERATIONS

# At these moments a calendar, a number format or the offset of a time zone changes or ends.
MOMENTS = {
    "the first year": datetime(1, 1, 5, tzinfo=UTC),
    "the change to the Gregorian calendar": datetime(1582, 10, 15, tzinfo=UTC),
    "the lower limit of 64-bit nanoseconds": datetime(1677, 9, 21, 0, 12, 43, 145_225, UTC),
    "the end of February 1900, which had no leap day": datetime(1900, 3, 1, tzinfo=UTC),
    "the lower limit of signed 32-bit seconds": datetime(1901, 12, 13, 20, 45, 52, tzinfo=UTC),
    "the Unix epoch": datetime(1970, 1, 1, tzinfo=UTC),
    "the begin of a leap day": datetime(2024, 2, 29, tzinfo=UTC),
    "the end of a leap day": datetime(2024, 3, 1, tzinfo=UTC),
    "the change to summer time in New York": datetime(2026, 3, 8, 7, tzinfo=UTC),
    "the change to summer time in Paris": datetime(2026, 3, 29, 1, tzinfo=UTC),
    "the change to winter time in Paris": datetime(2026, 10, 25, 1, tzinfo=UTC),
    "the change to winter time in New York": datetime(2026, 11, 1, 6, tzinfo=UTC),
    "the end of a year": datetime(2027, 1, 1, tzinfo=UTC),
    "the end of an ISO year": datetime(2027, 1, 4, tzinfo=UTC),
    "the upper limit of signed 32-bit seconds": datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC),
    "the upper limit of unsigned 32-bit seconds": datetime(2106, 2, 7, 6, 28, 16, tzinfo=UTC),
    "the upper limit of 64-bit nanoseconds": datetime(2262, 4, 11, 23, 47, 16, 854_776, UTC),
    "the last year": datetime(9999, 12, 26, 0, 0, 0, 1, UTC),
}

# POSIX time zones, which need no time zone database, and the moments at which their offset changes.
_PARIS, _NEW_YORK = "CET-1CEST,M3.5.0,M10.5.0/3", "EST5EDT,M3.2.0,M11.1.0"
ZONE_CHANGES = {
    name: _PARIS if name.endswith("Paris") else _NEW_YORK
    for name in MOMENTS
    if name.endswith(("Paris", "New York"))
}

_KATHMANDU = timezone(timedelta(hours=5, minutes=45))

_READ_LEASES = ("try_claim_step", "get_step_claims", "get_claimed_step_keys")
"""Operations whose wrong results here break CLM-6, because only the leases vary."""


@contextmanager
def local_time_zone(zone: str) -> Iterator[None]:
    """Set the time zone of this process, where the system allows it."""
    if not hasattr(time, "tzset"):
        yield
        return
    before = os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()


_CLAUSES = ("INP-3", "CLM-6", "STP-8", "CTL-2", "CTL-3", "SIG-4", "RET-1", "QRY-1", "QRY-4", "QRY-5")


@check(*_CLAUSES, needs=[Capability.VIRTUAL_CLOCK], alone=True)
async def moments_compare_exactly_at_the_edges_of_calendars(context: CheckContext) -> None:
    """Leases, deadlines, retention, series and order are exact to the microsecond in any local time zone."""
    clock = require_clock(context)
    model = Model(clock)
    random = context.random
    names = {random.choice(list(ZONE_CHANGES)), random.choice(list(MOMENTS))}
    if context.profile is not Profile.QUICK:
        names = {*MOMENTS}
    for name, moment in MOMENTS.items():
        if name not in names:
            continue
        zone = ZONE_CHANGES.get(name) or random.choice(list(ZONE_CHANGES.values()))
        with local_time_zone(zone):
            # A store that is opened in this zone, if the backend allows a second one.
            store = await new_store(context)
            comparison = _Comparison(context, store, model, f"near {name} in the local time zone {zone}")
            await _compare_around(comparison, clock, moment)
            await _compare_runs(comparison, clock, moment)
            if store is not context.store:
                await store.aclose()


class _Comparison:
    """Makes each call on a store and on the model, and compares their outcomes."""

    def __init__(self, context: CheckContext, store: FlowStore, model: Model, where: str) -> None:
        self.context = context
        self._store = store
        self._model = model
        self._where = where

    async def call(self, method: str, /, **given: Any) -> None:
        """Make one call on both, unless the backend does not have it; datetimes may have any zone."""
        if not OPERATIONS[method].is_offered(self.context.capabilities):
            return
        found = await execute(self._store, Call(method=method, arguments=given))
        wanted = self._expected(method, given)
        self.context.assertions += 1
        if found != wanted:
            arguments = ", ".join(f"{name}={_brief(value)}" for name, value in given.items())
            what = f"{method}({arguments}) at {self._model.now}, {self._where}"
            clause = "CLM-6" if method in _READ_LEASES else OPERATIONS[method].clauses[0]
            raise ContractViolation(
                f"{what}: {_difference(wanted, found)}", clause="CON-2" if is_foreign(found) else clause
            ) from (found.exception if isinstance(found, Raised) else None)

    def _expected(self, method: str, given: dict[str, Any]) -> Outcome:
        """The model's outcome; core normalises datetimes before a call reaches a store."""
        normalised = {
            name: value.astimezone(UTC) if isinstance(value, datetime) else value
            for name, value in given.items()
        }
        try:
            return Returned(comparable(getattr(self._model, method)(**normalised)))
        except FlowStoreError as error:
            return Raised(type(error).__name__)


def _brief(value: object) -> str:
    return str(value) if isinstance(value, (datetime, timedelta)) else repr(value)


def _difference(wanted: Outcome, found: Outcome) -> str:
    if isinstance(wanted, Returned) and isinstance(found, Returned):
        return expected_and_got(wanted.value, found.value)
    return f"expected {wanted}, got {found}"


async def _compare_around(both: _Comparison, clock: VirtualClock, moment: datetime) -> None:
    """Let leases, deadlines, waits and runs begin and end around a moment."""
    run_id = new_id(both.context)
    of_run = {"run_id": run_id}
    local = moment.astimezone(_KATHMANDU)
    clock.now = moment - DAY - HOUR
    await both.call("start_run", flow_id=FLOW, flow_name="dates", trigger_key="manual", **of_run)
    await both.call("configure_run", flow_id=FLOW, trigger_key="manual", timeout_at=local, **of_run)
    await both.call("try_record_dispatch", step_key="due", due_at=local, **of_run)
    await both.call("register_waiter", step_key="wait", signal_name="go", expires_at=local, **of_run)
    if Capability.LEASES in both.context.capabilities:
        leases = {"day": DAY + HOUR, "two days": 2 * DAY, "year": 366 * DAY, "renewed": DAY}
        for key, lease in leases.items():
            await both.call("try_claim_step", step_key=key, owner="me", lease=lease, **of_run)
        clock.now = moment - MINUTE
        for key in ("renewed", "two days"):
            await both.call("renew_step_claim", step_key=key, owner="me", lease=MINUTE, **of_run)
        await both.call("try_claim_step", step_key="renewed", owner="next", lease=MINUTE, **of_run)
        await both.call("get_step_claims", **of_run)
    for shift in (-HOUR, -TICK, 0 * TICK, TICK, HOUR):
        await _read_at(both, clock, moment + shift, run_id)


async def _read_at(both: _Comparison, clock: VirtualClock, at: datetime, run_id: UUID) -> None:
    """Make the calls that compare a stored datetime with now, or with as_of."""
    clock.now = at
    of_run = {"run_id": run_id}
    if Capability.LEASES in both.context.capabilities:
        for key in ("day", "renewed"):
            owner = f"rival at {at}"
            await both.call("try_claim_step", step_key=key, owner=owner, lease=DAY, **of_run)
    for as_of in (None, at.astimezone(_KATHMANDU)):
        await both.call("get_stalled_steps", as_of=as_of, take=both.context.page_size)
        await both.call("get_runs_to_stop", as_of=as_of, take=both.context.page_size)
        await both.call("get_statistics", as_of=as_of)
    await both.call("get_claimed_step_keys", **of_run)
    await both.call("mark_timed_out", as_of=at, **of_run)
    await both.call("expire_waiter", step_key="wait", **of_run)
    # The records of all these datetimes.
    for method in ("get_run_detail", "get_run_control", "get_step_claims", "get_dispatches", "get_waiters"):
        await both.call(method, **of_run)


async def _compare_runs(both: _Comparison, clock: VirtualClock, moment: datetime) -> None:
    """Start and complete runs around a moment, read their series, order and statistics, and delete them."""
    # Another flow than that of the Running runs.
    flow = {"flow_id": new_id(both.context), "flow_name": "dates", "trigger_key": "manual"}
    statuses = (RunStatus.SUCCEEDED, RunStatus.FAILED)
    for number, (begin, end) in enumerate(
        (
            (-DAY, -HOUR),
            (-HOUR, -TICK),
            (-TICK, 0 * TICK),
            (0 * TICK, TICK),
            (TICK, HOUR),
            (HOUR, DAY),
            (DAY, DAY),
        )
    ):
        run_id = new_id(both.context)
        clock.now = moment + begin
        await both.call("start_run", **flow, run_id=run_id)
        clock.now = moment + end
        await both.call("complete_run", run_id=run_id, status=statuses[number % 2])
    since, until = (moment - DAY).astimezone(_KATHMANDU), (moment + DAY + TICK).astimezone(_KATHMANDU)
    for granularity in ("hour", "day"):
        for flow_id in (None, flow["flow_id"]):
            given = {"granularity": granularity, "since": since, "until": until, "flow_id": flow_id}
            await both.call("get_run_timeseries", **given)
    for as_of in (moment - TICK, moment, moment + DAY):
        await both.call("get_statistics", as_of=as_of.astimezone(_KATHMANDU))
    await both.call("get_runs", take=20)
    for shift in (-TICK, TICK):
        position = RunPosition(started_at=moment + shift, run_id=UUID(int=2**127))
        await both.call("get_runs", after=position, take=20)
    clock.now = moment + 2 * DAY
    for cutoff in (moment - TICK, moment, moment + TICK, moment + DAY, moment + DAY + TICK):
        await both.call("cleanup", cutoff=cutoff.astimezone(_KATHMANDU))
        await both.call("get_runs", take=20)
