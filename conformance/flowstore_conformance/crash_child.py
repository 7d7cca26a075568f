"""The process that the crash checks kill: it writes endlessly and reports every acknowledged call.

``python -m flowstore_conformance.crash_child URL SEED WORKERS LIMIT`` opens the store, prints ``ready``,
waits for a line on stdin, and then each worker makes the calls of its script, run after run. For each call
that returned it prints the line ``worker number``; for a call that raised, followed by the error's name and
trace. The parent knows the scripts, so the numbers identify the calls. If a call takes longer than LIMIT
seconds, it prints ``hung`` with a description and exits.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Collection, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import full_archive
from flowstore_conformance.history import Call
from flowstore_conformance.state_probe import invoke
from flowstore_conformance.traces import pack_error
from flowstore_conformance.watchdog import Limits, watch_process
from flowstore_core import (
    Capability,
    FlowStore,
    FlowStoreError,
    RunArchive,
    StepRequest,
    StepStatus,
    open_store,
)

FLOW_ID = UUID(int=0xC4A54)
LATER = datetime(2099, 1, 1, tzinfo=UTC)


def script(seed: int, worker: int, capabilities: Collection[Capability]) -> Iterator[Call]:
    """The endless sequence of calls of one worker: short runs that no other worker writes.

    Every call changes state, and none depends on the time.
    """
    generator = random.Random(f"{seed}/{worker}")
    while True:
        yield from _one_run(generator, capabilities)


def run_of(call: Call) -> UUID:
    if "queues" in call.arguments:
        return UUID(hex=call.arguments["queues"][0].removeprefix("queue/"))
    if "archive" in call.arguments:
        archive: RunArchive = call.arguments["archive"]
        return archive.run_id
    run_id = call.arguments["run_id"]
    assert isinstance(run_id, UUID)
    return run_id


def tags_of(run_id: UUID) -> dict[str, str]:
    """The first tags of a run; no other run has the tag ``run``."""
    return {"env": "test", "run": run_id.hex, "team": "ops"}


def _one_run(generator: random.Random, capabilities: Collection[Capability]) -> Iterator[Call]:
    run_id = UUID(int=generator.getrandbits(128))
    key = {"idempotency_key": f"key of {run_id}"}
    has_tags = Capability.TAGS in capabilities
    tags = {"tags": tags_of(run_id)} if has_tags else {}
    new = {"flow_id": FLOW_ID, "flow_name": "crash", "run_id": run_id, "trigger_key": "manual"}

    def on(method: str, **arguments: object) -> Call:
        return Call(method=method, arguments={"run_id": run_id, **arguments})

    if Capability.TRIGGER in capabilities:
        yield Call(method="trigger_run", arguments={**new, **key, **tags, "timeout_at": LATER})
    else:
        where = {name: value for name, value in new.items() if name != "flow_name"}
        yield Call(method="try_register_idempotency_key", arguments={**where, **key})
        yield Call(method="start_run", arguments={**new, **tags})
        yield Call(method="configure_run", arguments={**where, **key, "timeout_at": LATER})
    for step_key in ("a", "b"):
        step = {"step_key": step_key}
        owner = {"owner": f"owner of {step_key}"}
        yield on("try_record_dispatch", **step)
        yield on("annotate_dispatch", **step, job_id="job 1")
        yield on("try_claim_step", **step, **owner)
        yield on("record_step_start", **step, step_type="http", input_json="{ }", **owner)
        if step_key == "a" and Capability.RECOVERY in capabilities:
            yield on("reschedule_step", **step, attempt=1, output_json="1", due_at=LATER)
            yield on("record_step_start", **step, step_type="http")
        if Capability.OUTPUTS in capabilities:
            value = str(generator.random())
            yield on("save_output", key=step_key, value_json=value)
            yield on("save_outputs", outputs={f"{step_key}/1": value, f"{step_key}/2": value})
        if Capability.EVENTS in capabilities:
            yield on("append_event", event_type="done", step_key=step_key)
        if step_key == "a":
            yield on("record_step_complete", **step, status="Succeeded", output_json="[1]")
    if Capability.LEASES in capabilities:
        step = {"step_key": "n", "owner": "owner of n"}
        # Of two calls, so that the next one archives an attempt.
        for status in ("Pending", "Succeeded"):
            yield on("try_start_step", **step, step_type="http", lease=timedelta(days=1), input_json="{ }")
            yield on("record_step_complete", **step, status=status, output_json="[1]")
    if Capability.QUEUES in capabilities:
        yield from _queued_steps(run_id)
    yield on("record_step_complete", step_key="b", status="Failed", error_message="no")
    yield on("register_waiter", step_key="c", signal_name="go")
    yield on("deliver_signal", signal_name="go", payload_json="{}", delivery_id="d")
    if Capability.MAILBOX in capabilities:
        early = {"signal_name": "early", "buffer": True}
        for payload in ("1", "2", "3"):
            yield on("deliver_signal", payload_json=payload, delivery_id=payload, **early)
        yield on("register_waiter", step_key="d", signal_name="early")
        yield on("register_waiter", step_key="e", signal_name="other")
        yield on("register_waiter", step_key="e", signal_name="early")
    yield on("record_skipped_step", step_key="c", step_type="http", reason="b failed", owner="o")
    if has_tags:
        yield on("set_tags", tags={"env": "live", "team": None, "zone": "eu"})
    yield on("request_cancel", reason="enough")
    yield on("complete_run", status="Failed")
    yield on("retry_step", step_key="b", attempt=1, reset=["c"])
    if Capability.OUTPUTS in capabilities:
        yield on("delete_outputs", prefix="a")
    if Capability.DELETION in capabilities and generator.random() < 0.5:
        yield on("complete_run", status="Cancelled")
        yield on("delete_run")
        if Capability.TRANSFER in capabilities:
            yield Call(method="import_run", arguments={"archive": full_archive(run_id)})
            yield on("append_event", event_type="e")


def _queued_steps(run_id: UUID) -> Iterator[Call]:
    """Steps that pass through a queue of their run alone."""
    queue = f"queue/{run_id.hex}"
    claim = {"queues": [queue], "lease": timedelta(days=1), "limit": 2, "worker": "worker 1"}

    def on(method: str, step_key: str, **arguments: object) -> Call:
        return Call(method=method, arguments={"run_id": run_id, "step_key": step_key, **arguments})

    def request(step_key: str, **given: Any) -> StepRequest:
        return StepRequest(step_key=step_key, step_type="http", queue=queue, **given)

    yield on("try_record_dispatch", "q", queue=queue, priority=1, step_type="http", input_json="{ }")
    yield on("redispatch_step", "q", priority=2)
    yield Call(method="claim_next_steps", arguments=claim)
    failed = frozenset({StepStatus.FAILED})
    requests = (request("r"), request("s", after=("q",), accept=failed), request("t", due_at=LATER))
    yield on("advance_run", "q", status="Succeeded", attempt=1, dispatch=requests, complete_as="Succeeded")
    yield Call(method="claim_next_steps", arguments=claim)
    yield on("reschedule_step", "r", attempt=1, error_message="no", due_at=LATER)


def _send(line: str) -> None:
    # Unbuffered, so that a reported line survives the kill.
    os.write(1, f"{line}\n".encode())


async def _write(store: FlowStore, calls: Iterator[Call], worker: int) -> None:
    for number, call in enumerate(calls):
        try:
            await invoke(store, call)
        except Exception as error:  # noqa: BLE001 - reported to the parent
            what = type(error).__name__ if isinstance(error, FlowStoreError) else f"!{type(error).__name__}"
            _send(f"{worker} {number} {what} {json.dumps(pack_error(error))}")
            return
        _send(f"{worker} {number}")


async def main(url: str, seed: int, workers: int, limit: float) -> None:
    watch_process(Limits(limit, limit, limit), lambda hang: _send(f"hung {hang.to_json()}"))
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(open_store(url))
        except Exception as error:  # noqa: BLE001 - reported to the parent
            # Only errors of the contract guarantee a text without secrets.
            text = f": {error}" if isinstance(error, FlowStoreError) else ""
            _send(f"refused {type(error).__name__}{text}".replace("\n", " "))
            return
        capabilities = store.capabilities
        _send("ready")
        await asyncio.to_thread(sys.stdin.readline)
        calls = [script(seed, worker, capabilities) for worker in range(workers)]
        await asyncio.gather(*(_write(store, own, worker) for worker, own in enumerate(calls)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
