"""A process with lanes of a run of the suite: ``python -m flowstore_conformance.lane_worker``.

The message on stdin is a LaneOrder. The replies on stdout are JSON lines: ``{"result": ...}`` for each check
that has ended, ``{"made": url}`` and ``{"dropped": url}`` for the namespaces, and
``{"refused": error}`` if it is not safe to continue. The process ends when the queue is empty, and at once if
it does not have the backend and the checks of the order. The end of stdin stops it: it drops its namespaces
first.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

from flowstore_conformance.context import Profile
from flowstore_conformance.guard import GuardedBackend, Refused
from flowstore_conformance.lane_pool import CheckQueue, LaneOrder, origin_of, pack_check_result
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.network_faults import BackendWithNetworkFaults
from flowstore_conformance.suite import SuiteRun, Variants, select_checks
from flowstore_conformance.supervisor import Stopped, Supervisor
from flowstore_conformance.watchdog import Limits, Watchdog
from flowstore_conformance.wire import Receive, Send, connect_harness
from flowstore_core import Backend, BackendLoadError, Capability, UnknownBackendError
from flowstore_core.plugins import find_backend
from flowstore_core.urls import parse_url, redact


class ReportingBackend(GuardedBackend):
    """A guarded backend that sends the names of its namespaces when it makes and drops them."""

    def __init__(self, backend: Backend, url: str, capabilities: frozenset[Capability], send: Send) -> None:
        super().__init__(backend, url, capabilities)
        self._send = send

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        with ExitStack() as stack:
            async with super().scratch(url) as fresh:
                name = redact(fresh)
                self._send({"made": name})
                stack.callback(self._send, {"dropped": name})
                yield fresh


async def main() -> None:
    receive, send_line = await connect_harness()

    def send(message: Mapping[str, Any]) -> None:
        # Without a suite the process still drops its namespaces.
        with suppress(BrokenPipeError):
            send_line(message)

    message = await receive()
    if message is not None:
        await _run(LaneOrder(**message), receive, send)


async def _run(order: LaneOrder, receive: Receive, send: Send) -> None:
    try:
        _, backend = find_backend(parse_url(order.url).scheme)
    except (UnknownBackendError, BackendLoadError):
        # Registered only in the process of the suite.
        return
    known = {check.name: check for check in select_checks(faults=order.faults)}
    if origin_of(backend) != order.origin or not known.keys() >= set(order.checks):
        return
    if order.faults:
        backend = BackendWithNetworkFaults(backend)
    capabilities = frozenset(map(Capability, order.capabilities))
    reporting = ReportingBackend(backend, order.url, capabilities, send)
    reporting.findings = tuple(SignatureFinding(**one) for one in order.findings)
    stop = asyncio.Event()

    async def wait_for_end() -> None:
        await receive()
        stop.set()

    waiting = asyncio.create_task(wait_for_end())
    run = SuiteRun(
        order.url,
        reporting,
        Profile(order.profile),
        order.seed,
        Supervisor(Watchdog(Limits(**order.limits))),
        Variants(backend, order.url, order.seed, order.variant),
        stop,
    )
    try:
        await run.take_checks(
            [known[name] for name in order.checks],
            CheckQueue(order.queue),
            lambda result: send({"result": pack_check_result(result)}),
            order.lanes,
        )
    except Stopped:
        # The suite does not want the other results.
        pass
    except Refused as error:
        send({"refused": str(error)})
    finally:
        await run.aclose()
        waiting.cancel()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except Exception:  # noqa: BLE001 - shown as the interpreter would
        traceback.print_exc()
    finally:
        # Without waiting for threads of the backend, one of which may hang.
        sys.stderr.flush()
        os._exit(0)
