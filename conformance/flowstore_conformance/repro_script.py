"""Generate reproduction programs: the calls of a failure, as a file that runs on the URL of any store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, literal

_HEAD = '''"""{title}

Its argument is the URL of an empty store, such as sqlite:////tmp/empty.db
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from flowstore_core import EndedStep, FlowStoreError, RunArchive, StepRequest, open_store
from flowstore_core.redaction import full_repr

START = {start}
now = START
owners = {{}}  # of the claims that claim_next_steps made


async def outcome(call):
    try:
        result = await call
    except FlowStoreError as error:
        return f"raises {{type(error).__name__}}"
    for each in result if isinstance(result, tuple) else ():
        if hasattr(each, "owner") and hasattr(each, "attempt"):
            owners[each.run_id, each.step_key] = each.owner
    shown = full_repr(result)
    for owner in owners.values():
        shown = shown.replace(owner, "<token>")
    return shown

'''

_SEQUENTIAL = """
async def main(url):
    global now
    async with {stores}:
{body}


asyncio.run(main(sys.argv[1]))
"""

_CONCURRENT = '''
async def client(ids, name, store, calls):
    seen = []
    for method, make in calls:
        result = await outcome(make(store))
        for number, each in enumerate(ids):
            # Ids differ between rounds; with names instead, equal results can be counted.
            result = result.replace(repr(each), f"ids[{{number}}]")
        seen.append(f"{{name}}: {{method}}: {{result}}")
    return seen


async def one_round(stores):
    """Run the race once on new ids; return the results of each client."""
    global now
    now = START
    ids = [uuid4() for _ in range({ids})]
    phases = [
{body}
    ]
    seen = []
    for advance, clients in phases:
        now += advance
        running = (
            client(ids, f"client {{n}}", stores[n % len(stores)], calls) for n, calls in enumerate(clients)
        )
        for results in await asyncio.gather(*running):
            seen += results
    return tuple(seen)


async def main(url):
    counts = {{}}
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(url{clock})) for _ in range({stores})]
        for _ in range({rounds}):
            seen = await one_round(stores)
            counts[seen] = counts.get(seen, 0) + 1
    for seen, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"{{count}} of {rounds} rounds:", *seen, sep="\\n    ")


asyncio.run(main(sys.argv[1]))
'''


STORE_NAMES = ("store", "second_store")
"""The names of the stores of a sequential program; both are open on one namespace."""


@dataclass(frozen=True, slots=True)
class ReproCall:
    """A clock advance, then a call with its expected and actual outcome."""

    clock_advance: timedelta
    call: Call
    expected: Outcome
    actual: Outcome
    store: int = 0
    """The index of the store in STORE_NAMES."""


def sequential_script(
    title: str, start: datetime, entries: Iterable[ReproCall], *, clock: bool = True
) -> str:
    """A program that makes the calls sequentially and prints each result."""
    entries = list(entries)
    opened = f"open_store(url{', clock=lambda: now' if clock else ''})"
    stores = ", ".join(
        f"{opened} as {name}"
        for name in STORE_NAMES[: 1 + max((entry.store for entry in entries), default=0)]
    )
    body = []
    for entry in entries:
        if entry.clock_advance:
            body.append(f"        now += {literal(entry.clock_advance)}")
        if entry.expected != entry.actual:
            body.append(f"        # expected: {answer_text(entry.expected)}")
            body.append(f"        # got:      {answer_text(entry.actual)}")
        call = entry.call.source(store=STORE_NAMES[entry.store])
        body.append(f'        print("{entry.call.method}:", await outcome({call}))')
    head = _HEAD.format(title=_docstring(title), start=literal(start))
    return head + _SEQUENTIAL.format(stores=stores, body="\n".join(body))


@dataclass(frozen=True, slots=True)
class ReproPhase:
    """One phase of a race: a clock advance, then the calls of clients concurrently."""

    clock_advance: timedelta
    clients: Sequence[Sequence[Call]]


def concurrent_script(
    title: str,
    start: datetime,
    phases: Sequence[ReproPhase],
    ids: Sequence[UUID],
    *,
    clock: bool = True,
    stores: int | None = None,
    rounds: int = 200,
) -> str:
    """A program that repeats a race on new ids and prints how often each set of results occurred.

    Clients are assigned to ``stores`` stores round-robin; by default each client has its own store.
    """
    names = {each: f"ids[{index}]" for index, each in enumerate(ids)}
    head = _HEAD.format(title=_docstring(title), start=literal(start))
    return head + _CONCURRENT.format(
        ids=len(ids),
        body="\n".join(_phase(phase, names) for phase in phases),
        clock=", clock=lambda: now" if clock else "",
        stores=stores or max(len(phase.clients) for phase in phases),
        rounds=rounds,
    )


def _phase(phase: ReproPhase, names: Mapping[UUID, str]) -> str:
    entries = [f"        ({literal(phase.clock_advance)}, ["]
    for calls in phase.clients:
        entries.append("            [")
        entries += [
            f'                ("{call.method}", lambda store: {call.source(names)}),' for call in calls
        ]
        entries.append("            ],")
    return "\n".join([*entries, "        ]),"])


def answer_text(outcome: Outcome) -> str:
    """Format an outcome as one line."""
    if outcome is UNKNOWN:
        return "no answer, so its effect is unknown"
    text = f"raises {outcome.error}" if isinstance(outcome, Raised) else _plain(outcome.value)
    return text if len(text) <= 1500 else f"{text[:1500]}..."


def _plain(value: Any) -> str:
    """Format a comparable value (see history.comparable) like the record that it was made from."""
    match value:
        case UUID():
            return str(value)
        case datetime():
            return value.isoformat()
        case frozenset():
            return "{" + ", ".join(sorted(_plain(each) for each in value)) + "}"
        case (str() as name, tuple() as fields) if name[:1].isupper():
            return f"{name}({', '.join(f'{field}={_plain(each)}' for field, each in fields)})"
        case tuple():
            return f"({', '.join(_plain(each) for each in value)})"
    return repr(value)


def _docstring(title: str) -> str:
    return title.replace("\\", "\\\\").replace('"""', "'''")
