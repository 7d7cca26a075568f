"""Canaries, and everything that people or programs could see of them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
import traceback
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from flowstore_core import FlowStore, FlowStoreError, RunStatus, StepStatus
from flowstore_core.operations import OPERATIONS as CONTRACT

PASSWORD = "caNary/p@ss?w#rd:1"
"""As a person would type it; in a URL most of its characters must be encoded."""
ENCODED = "caNary%2Fp%40ss%3Fw%23rd%3A1"
IN_PASSWORDS = ("caNary", "ss?w", "ss%3Fw", "rd:1", "rd%3A1")
"""Any of these is a part of the password."""

CANARY, NAMED = "wAxbill", "nAmebill"
"""In an application's data; in names that the application has given."""
TEXTS = {
    **dict.fromkeys(
        ("trigger_data", "input_json", "output_json", "error_message", "reason", "payload_json"), CANARY
    ),
    **dict.fromkeys(("idempotency_key", "value_json", "message", "search"), CANARY),
    **dict.fromkeys(("flow_name", "trigger_key", "job_id", "step_type", "owner", "signal_name"), NAMED),
    **dict.fromkeys(("delivery_id", "event_type", "key"), NAMED),
}
"""Every argument of the contract that is text, but the step's key, by which errors name a step."""
OPERATIONS = ("ping", *CONTRACT)


class Watch:
    """Gathers what is shown while it is open."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, str]] = []
        self.errors: list[BaseException] = []

    def see(self, where: str, text: str) -> None:
        self.shown.append((where, text))

    def catch(self, error: BaseException, where: str) -> None:
        """All that an error shows, to people and to programs that walk what is chained to it."""
        self.errors.append(error)
        self.see(f"traceback of {where}", "".join(traceback.format_exception(error)))
        seen: set[int] = set()
        todo: list[BaseException | None] = [error]
        while todo:
            one = todo.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            self.see(f"{where}: {type(one).__name__}", f"{one} {one!r} {one.args!r} {vars(one)!r}")
            todo += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                todo += one.exceptions
        if isinstance(error, FlowStoreError):
            self.see(f"pickle of {where}", pickle.dumps(error).decode("latin-1"))

    def found(self, *secrets: str) -> list[str]:
        """Where any of the secrets shows."""
        return [f"{where}: {text}" for where, text in self.shown if any(secret in text for secret in secrets)]

    def check(self) -> None:
        """Nothing of a password, of a row's data or of names; a record may show names."""
        assert self.shown, "nothing was seen, so nothing was checked"
        names = [told for told in self.found(NAMED) if not told.startswith("answer of ")]
        told = [text[:1000] for text in (*self.found(CANARY, *IN_PASSWORDS), *names)]
        assert not told, "\n".join(told[:5])


class _Handler(logging.Handler):
    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.DEBUG)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter("%(message)s").format(record)
        # Structured handlers write the arguments and the extra fields too.
        self._watch.see(f"log of {record.name}", f"{text} {record.args!r} {vars(record)!r}")
        if record.exc_info and record.exc_info[1]:
            self._watch.catch(record.exc_info[1], f"log of {record.name}")


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch logs of every logger at DEBUG, warnings, and whatever is caught."""
    watch = Watch()
    handler, root = _Handler(watch), logging.getLogger()
    names = ["", *logging.root.manager.loggerDict, "aiosqlite", "asyncpg", "asyncio"]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield watch
        for one in warned:
            watch.see("warning", f"{one.message} {one!r}")
    finally:
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@asynccontextmanager
async def watching_loop() -> AsyncIterator[Watch]:
    """As watching, and what the event loop reports."""
    loop = asyncio.get_running_loop()
    with watching() as watch:

        def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            watch.see("event loop", repr(context))
            if error := context.get("exception"):
                watch.catch(error, "event loop")

        loop.set_exception_handler(handle)
        try:
            yield watch
        finally:
            loop.set_exception_handler(None)


def values(run_id: UUID) -> dict[str, Any]:
    """A value for every parameter of the contract; canaries where it is text."""
    moment = datetime(2026, 3, 14, tzinfo=UTC)
    return {
        **{name: f"{marker} in {name}" for name, marker in TEXTS.items()},
        "run_id": run_id,
        "flow_id": UUID(int=7),
        "source_run_id": run_id,
        "step_key": "step",
        "status": None,
        "expected": None,
        "lease": timedelta(seconds=60),
        "due_at": None,
        "timeout_at": moment,
        "expires_at": moment,
        "as_of": None,
        "cutoff": moment,
        "since": moment,
        "until": moment + timedelta(hours=3),
        "granularity": "hour",
        "reset": (),
        "attempt": 1,
        "after": None,
        "skip": 0,
        "take": 10,
    }


async def exercise(
    store: FlowStore, watch: Watch, run_id: UUID | None = None, *, rounds: int = 2, **other: Any
) -> int:
    """Call every operation, so many times; how many raised."""
    run_id = run_id or uuid4()
    given = {**values(run_id), **other}
    before = len(watch.errors)
    for round_ in range(rounds):
        for name in OPERATIONS:
            operation = getattr(store, name)
            arguments = _arguments(name, operation, given)
            try:
                answer = await operation(**arguments)
            except FlowStoreError as error:
                watch.catch(error, f"{name}, round {round_}")
            else:
                if not isinstance(answer, (str, frozenset, Mapping)):
                    watch.see(f"answer of {name}", repr(answer))
    return len(watch.errors) - before


def _arguments(name: str, operation: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {key: given[key] for key in inspect.signature(operation).parameters}
    if "after" in arguments and name == "get_run_events":
        arguments["after"] = 0
    if name == "complete_run":
        arguments["status"] = RunStatus.FAILED
    elif name in ("record_step_complete",):
        arguments["status"] = StepStatus.FAILED
    return arguments
