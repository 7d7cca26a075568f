"""JSON lines that the harness and worker processes exchange: client tasks and their results."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from flowstore_conformance.history import UNKNOWN, Call, Operation, Outcome, Raised, Returned
from flowstore_conformance.races import ClientResult, ClientTask
from flowstore_conformance.traces import RemoteError, pack_error
from flowstore_core import EndedStep, RunArchive, RunPosition, StepRequest

TICK = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


Receive = Callable[[], Awaitable[dict[str, Any] | None]]
"""Waits for the next message; None at the end of the input."""

Send = Callable[[Mapping[str, Any]], None]
"""Sends a message."""


async def connect_harness() -> tuple[Receive, Send]:
    """Connect a child process with the harness, by its stdin and stdout.

    From then on stdout leads to stderr: whatever prints to it must not disturb the harness.
    """
    lines = asyncio.StreamReader(limit=1 << 26)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin.buffer)
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    async def receive() -> dict[str, Any] | None:
        line = await lines.readline()
        return read_line(line) if line else None

    def send(message: Mapping[str, Any]) -> None:
        data = write_line(message)
        while data:
            data = data[os.write(out, data) :]

    return receive, send


def write_line(message: Mapping[str, Any]) -> bytes:
    """Encode a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def read_line(line: bytes) -> dict[str, Any]:
    """Decode the message of a line."""
    message: dict[str, Any] = json.loads(line)
    return message


def pack(value: Any) -> Any:
    """Encode a value as JSON; types unknown to JSON become an object whose key is a letter for the type."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Enum):
        return pack(value.value)
    if isinstance(value, str):
        return value
    if isinstance(value, UUID):
        return {"u": value.hex}
    if isinstance(value, datetime):
        return {"d": (value - EPOCH) // TICK}
    if isinstance(value, timedelta):
        return {"s": value // TICK}
    if isinstance(value, RunPosition):
        return {"p": str(value)}
    if isinstance(value, RunArchive):
        return {"a": value.to_json()}
    if isinstance(value, StepRequest):
        return {"q": _pack_fields(value)}
    if isinstance(value, EndedStep):
        return {"e": _pack_fields(value)}
    if isinstance(value, Mapping):
        return {"m": [[pack(key), pack(each)] for key, each in value.items()]}
    if isinstance(value, (set, frozenset)):
        return {"f": [pack(each) for each in value]}
    if isinstance(value, tuple):
        return {"t": [pack(each) for each in value]}
    if isinstance(value, list):
        return [pack(each) for each in value]
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


def _pack_fields(record: StepRequest | EndedStep) -> dict[str, Any]:
    return {each.name: pack(getattr(record, each.name)) for each in dataclasses.fields(record)}


def unpack(value: Any) -> Any:
    """Decode a packed value."""
    if isinstance(value, list):
        return [unpack(each) for each in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "u":
        return UUID(hex=content)
    if kind == "d":
        return EPOCH + content * TICK
    if kind == "s":
        return content * TICK
    if kind == "p":
        return RunPosition.parse(content)
    if kind == "a":
        return RunArchive.from_json(content)
    if kind == "q":
        return StepRequest(**{name: unpack(each) for name, each in content.items()})
    if kind == "e":
        return EndedStep(**{name: unpack(each) for name, each in content.items()})
    if kind == "m":
        return {unpack(key): unpack(each) for key, each in content}
    items = [unpack(each) for each in content]
    return frozenset(items) if kind == "f" else tuple(items)


def pack_task(client_task: ClientTask) -> dict[str, Any]:
    calls = [[call.method, pack(call.arguments)] for call in client_task.calls]
    return {
        "race": client_task.race,
        "client": client_task.client,
        "calls": calls,
        "yields": list(client_task.yields),
    }


def unpack_task(packed: Mapping[str, Any]) -> ClientTask:
    return ClientTask(
        race=packed["race"],
        client=packed["client"],
        calls=tuple(Call(method=method, arguments=unpack(given)) for method, given in packed["calls"]),
        yields=tuple(packed["yields"]),
    )


def pack_result(done: ClientResult) -> dict[str, Any]:
    operations = [
        [
            one.call.method,
            pack(one.call.arguments),
            one.invoked,
            _finite(one.returned),
            pack_outcome(one.outcome),
        ]
        for one in done.operations
    ]
    return {
        "race": done.race,
        "operations": operations,
        "suspended": done.suspended,
        "unavailable": done.unavailable,
    }


def unpack_result(packed: Mapping[str, Any], client: int, now: datetime) -> ClientResult:
    operations = tuple(
        Operation(
            client=client,
            call=Call(method=method, arguments=unpack(arguments)),
            invoked=invoked,
            returned=float("inf") if returned is None else returned,
            outcome=unpack_outcome(outcome),
            now=now,
        )
        for method, arguments, invoked, returned, outcome in packed["operations"]
    )
    return ClientResult(
        race=packed["race"],
        operations=operations,
        suspended=packed["suspended"],
        unavailable=packed["unavailable"],
    )


def _finite(moment: float) -> float | None:
    return None if moment == float("inf") else moment


def pack_outcome(outcome: Outcome) -> Any:
    if outcome is UNKNOWN:
        return None
    if isinstance(outcome, Raised):
        error = outcome.exception
        if error is None:
            return {"raised": outcome.error}
        return {"raised": outcome.error, "exception": pack_error(error)}
    return {"returned": pack(outcome.value)}


def unpack_outcome(packed: Any) -> Outcome:
    if packed is None:
        return UNKNOWN
    if "raised" not in packed:
        return Returned(unpack(packed["returned"]))
    remote = packed.get("exception")
    return Raised(packed["raised"], None if remote is None else RemoteError(packed["raised"], **remote))
