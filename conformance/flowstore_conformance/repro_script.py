"""Programs for people: calls that showed a failure, as a file that runs alone on the URL of any store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, literal

_HEAD = '''"""{title}

Its argument is the URL of a store that holds nothing, such as sqlite:////tmp/empty.db
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from flowstore_core import FlowStoreError, open_store
from flowstore_core.redaction import full_repr

START = {start}
now = START


async def told(call):
    try:
        return full_repr(await call)
    except FlowStoreError as error:
        return f"raises {{type(error).__name__}}"

'''

_SEQUENTIAL = """
async def main(url):
    global now
    async with open_store(url{clock}) as store:
{body}


asyncio.run(main(sys.argv[1]))
"""

_CONCURRENT = '''
async def client(ids, name, store, calls):
    seen = []
    for method, make in calls:
        answer = await told(make(store))
        for number, each in enumerate(ids):
            # Ids are new in each round; by name, the answers of rounds can be counted.
            answer = answer.replace(repr(each), f"ids[{{number}}]")
        seen.append(f"{{name}}: {{method}}: {{answer}}")
    return seen


async def one_round(stores):
    """One race on ids of its own; what each client was told."""
    global now
    now = START
    ids = [uuid4() for _ in range({ids})]
    phases = [
{body}
    ]
    seen = []
    for jump, clients in phases:
        now += jump
        running = (
            client(ids, f"client {{n}}", stores[n % len(stores)], calls) for n, calls in enumerate(clients)
        )
        for answers in await asyncio.gather(*running):
            seen += answers
    return tuple(seen)


async def main(url):
    counts = {{}}
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(url{clock})) for _ in range({stores})]
        for _ in range({rounds}):
            seen = await one_round(stores)
            counts[seen] = counts.get(seen, 0) + 1
    for seen, times in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"{{times}} of {rounds} rounds:", *seen, sep="\\n    ")


asyncio.run(main(sys.argv[1]))
'''


@dataclass(frozen=True, slots=True)
class ReproCall:
    """A jump of the clock, then a call with its answers."""

    clock_advance: timedelta
    call: Call
    expected: Outcome
    actual: Outcome


def sequential_script(
    title: str, start: datetime, entries: Iterable[ReproCall], *, clock: bool = True
) -> str:
    """A program that makes the calls one after the other and prints each answer."""
    body = []
    for entry in entries:
        if entry.clock_advance:
            body.append(f"        now += {literal(entry.clock_advance)}")
        if entry.expected != entry.actual:
            body.append(f"        # expected: {answer_text(entry.expected)}")
            body.append(f"        # got:      {answer_text(entry.actual)}")
        body.append(f'        print("{entry.call.method}:", await told({entry.call.source()}))')
    head = _HEAD.format(title=_docstring(title), start=literal(start))
    return head + _SEQUENTIAL.format(clock=", clock=lambda: now" if clock else "", body="\n".join(body))


@dataclass(frozen=True, slots=True)
class ReproPhase:
    """One phase of a race: a jump of the clock, then the calls of clients at the same time."""

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
    """A program that repeats a race with fresh ids, and prints which answers came how often.

    Clients share so many stores in turn; each has its own if nothing is said.
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
    """An outcome in a line."""
    if outcome is UNKNOWN:
        return "nothing, so it may have happened or not"
    text = f"raises {outcome.error}" if isinstance(outcome, Raised) else _plain(outcome.value)
    return text if len(text) <= 1500 else f"{text[:1500]}..."


def _plain(value: Any) -> str:
    """A comparable answer (see history.comparable) as one would write the record that it was."""
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
