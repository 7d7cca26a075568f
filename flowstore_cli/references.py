"""References to runs, flows and statuses: a whole id, a part of one, or a name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

import typer

from flowstore_cli.completion import complete_flow, complete_run, complete_run_status
from flowstore_cli.failures import NO, USAGE, Failure
from flowstore_cli.printing import moment
from flowstore_cli.words import suggestion
from flowstore_core import Capability, FlowRunRecord, FlowStore, RunStatus
from flowstore_core.inspection.flows import flows_named
from flowstore_core.inspection.tags import add_tag
from flowstore_core.inspection.wording import count
from flowstore_core.validation import MAX_SEARCH

FEWEST_DIGITS = 6
MOST_LISTED = 10
"""Maximum number of candidates listed for an ambiguous reference."""
GROUPS = (8, 12, 16, 20)
"""The digits of a UUID that a hyphen precedes."""


@dataclass(frozen=True, slots=True)
class RunId:
    """A user's reference to a run: its whole id, or its first or last digits."""

    digits: str

    def fits(self, run_id: UUID) -> bool:
        return run_id.hex.startswith(self.digits) or run_id.hex.endswith(self.digits)

    def searches(self) -> set[str]:
        """The digits in the form that they have at the beginning and at the end of a hyphenated id."""
        return {_hyphenated(self.digits, 0), _hyphenated(self.digits, 32 - len(self.digits))}


def _hyphenated(digits: str, start: int) -> str:
    """Digits of a UUID from digit ``start`` on, with the hyphens between them."""
    return "".join(
        f"-{digit}" if place in GROUPS and place > start else digit
        for place, digit in enumerate(digits, start)
    )


def parse_run(text: str) -> RunId:
    digits = text.strip().lower().replace("-", "")
    if re.fullmatch(f"[0-9a-f]{{{FEWEST_DIGITS},32}}", digits):
        return RunId(digits)
    raise Failure(
        f"RUN must be the id of a run, or at least {FEWEST_DIGITS} of its first or last hexadecimal digits, "
        f"not {text!r}; list the runs with: flowstore runs list",
        USAGE,
    )


def parse_tags(texts: Iterable[str]) -> dict[str, str]:
    """Tags from texts of the form KEY=VALUE; the key ends at the first ``=``."""
    tags: dict[str, str] = {}
    for text in texts:
        try:
            add_tag(tags, text)
        except ValueError as error:
            raise Failure(str(error), USAGE) from None
    return tags


def parse_status(text: str) -> RunStatus:
    for one in RunStatus:
        if one.lower() == text.strip().lower():
            return one
    names = ", ".join(RunStatus)
    raise Failure(f"--status must be one of {names}, not {text!r}{suggestion(text, RunStatus)}", USAGE)


Run = Annotated[
    RunId,
    typer.Argument(
        metavar="RUN",
        help=f"The run's id, or {FEWEST_DIGITS} or more of its first or last digits.",
        show_default=False,
        parser=parse_run,
        autocompletion=complete_run,
    ),
]
Runs = Annotated[
    list[RunId],
    typer.Argument(
        metavar="RUN...",
        help=f"The runs' ids, or {FEWEST_DIGITS} or more of their first or last digits.",
        show_default=False,
        parser=parse_run,
        autocompletion=complete_run,
    ),
]
Flow = Annotated[
    str | None,
    typer.Option(
        metavar="FLOW", help="Only runs of this flow: its name or id.", autocompletion=complete_flow
    ),
]
Tags = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        "-t",
        metavar="KEY=VALUE",
        help="Only runs with this tag; repeatable, for runs that have all of them.",
    ),
]
Status = Annotated[
    RunStatus | None,
    typer.Option(
        "--status",
        "-s",
        metavar="STATUS",
        help=f"Only runs in this status: {', '.join(RunStatus)}.",
        parser=parse_status,
        autocompletion=complete_run_status,
    ),
]


async def find_run(store: FlowStore, reference: RunId) -> UUID:
    """Resolve a reference to the id of one run. A whole id needs no read."""
    if len(reference.digits) == 32:
        return UUID(reference.digits)
    if Capability.DASHBOARD not in store.capabilities:
        raise Failure("this backend cannot search for a run; give the whole run id", USAGE)
    found: dict[UUID, FlowRunRecord] = {}
    take = store.limits.page_size
    for text in reference.searches():
        page = await store.get_runs_page(search=text, take=take)
        while page.runs and len(found) <= MOST_LISTED:
            # The search also matches digits in an output, or in the middle of an id.
            found.update((run.run_id, run) for run in page.runs if reference.fits(run.run_id))
            if len(page.runs) < take:
                break
            page = await store.get_runs_page(search=text, take=take, after=page.runs[-1].position)
    if len(found) == 1:
        return next(iter(found))
    which = f"an id that begins or ends with {reference.digits}"
    if not found:
        raise Failure(f"no run has {which}; list the runs with: flowstore runs list", NO)
    runs = sorted(found.values(), key=lambda run: run.started_at, reverse=True)
    listed = [
        f"{run.run_id}  {run.status:<9}  {moment(run.started_at)} UTC  {run.flow_name}"
        for run in runs[:MOST_LISTED]
    ]
    more = "more than " if len(runs) > MOST_LISTED else ""
    raise Failure(
        f"{more}{len(listed)} runs have {which}; give more digits, or one of these ids:", NO, listed
    )


async def find_flow(store: FlowStore, text: str) -> UUID:
    """Resolve the name or id of a flow to its id. An id needs no read."""
    try:
        return UUID(text)
    except ValueError:
        pass
    flows = await flows_named(store, text) if 0 < len(text) <= MAX_SEARCH else {}
    if len(flows) == 1:
        return next(iter(flows))
    if flows:
        listed = [f"{flow_id}  {count(runs, 'run')}" for flow_id, runs in flows.items()]
        raise Failure(f"{len(flows)} flows have the name {text!r}; give the id of one of them:", NO, listed)
    recent = {run.flow_name for run in await store.get_runs(take=store.limits.page_size)}
    close = suggestion(text, recent) or "; list the runs and their flows with: flowstore runs list"
    raise Failure(f"no run belongs to a flow {text!r}{close}", NO)
