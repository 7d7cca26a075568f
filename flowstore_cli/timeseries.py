"""``flowstore timeseries``: a chart of runs over time in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.text import Text

from flowstore_cli.durations import parse_moment
from flowstore_cli.failures import USAGE, Failure
from flowstore_cli.printing import cell, new_console, new_table, on_terminal, print_json, print_table
from flowstore_cli.references import Flow, find_flow
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_core import InvalidArgumentError, RunTimeseriesBucket, RunTimeseriesGranularity
from flowstore_core.inspection.wording import count, span
from flowstore_core.timeseries import MAX_BUCKETS

# The marks differ without colours too.
PARTS = (
    ("succeeded", "█", "green"),
    ("failed", "▓", "red"),
    ("cancelled", "▒", "yellow"),
    ("running", "░", "cyan"),
)
BAR = 20
DEFAULT_SINCE = {RunTimeseriesGranularity.HOUR: "24h", RunTimeseriesGranularity.DAY: "30d"}
FORMAT = {RunTimeseriesGranularity.HOUR: "%m-%d %H:%M", RunTimeseriesGranularity.DAY: "%Y-%m-%d"}


def timeseries(
    granularity: Annotated[
        RunTimeseriesGranularity, typer.Option("--by", "-b", help="Size of a bucket, in UTC.")
    ] = RunTimeseriesGranularity.HOUR,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="A time, or a duration before now. Default: 24h by hour, 30d by day."
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="WHEN", help="A time, or a duration before now. Default: now.")
    ] = None,
    flow: Flow = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Chart the runs of each hour or day.

    Runs count by start time and status; P50 and P95 are percentiles of their durations.

    \b
      flowstore timeseries
      flowstore timeseries --by day --since 90d
      flowstore timeseries --since 2025-06-01 --until 2025-06-02T12:00

    JSON: a list of objects with timestamp, total, succeeded, failed, cancelled, running,
    p50_duration_ms, p95_duration_ms (null if no run of the bucket is completed).
    """
    now = datetime.now(UTC)
    first = parse_moment(since or DEFAULT_SINCE[granularity], "--since", now)
    last = parse_moment(until, "--until", now) if until else now
    buckets = run(_timeseries(url, granularity, first, last, flow))
    if as_json:
        print_json(buckets)
    else:
        _print(buckets, granularity)


async def _timeseries(
    url: str | None,
    granularity: RunTimeseriesGranularity,
    since: datetime,
    until: datetime,
    flow: str | None,
) -> Sequence[RunTimeseriesBucket]:
    async with existing_store(url) as store:
        flow_id = None if flow is None else await find_flow(store, flow)
        try:
            return await store.get_run_timeseries(granularity, since, until, flow_id)
        except InvalidArgumentError as error:
            if error.argument != "until":
                raise
            limit = f"the chart may have {MAX_BUCKETS:,} rows at most; take a later --since"
            wider = ", or --by day" if granularity is RunTimeseriesGranularity.HOUR else ""
            raise Failure(f"{limit}{wider}", USAGE) from error


def _print(buckets: Sequence[RunTimeseriesBucket], granularity: RunTimeseriesGranularity) -> None:
    console = new_console()
    # Bars are for terminals; a pipe gets the numbers only.
    bars = ["RUNS"] if on_terminal() else []
    numbers = ("TOTAL", "SUCC", "FAIL", "CANC", "RUN", "P50", "P95")
    table = new_table(
        "FROM (UTC)", *bars, *numbers, right=numbers, short=bars, spare=("P95", "P50", "TOTAL", *bars)
    )
    most = max((bucket.total for bucket in buckets), default=0)
    for bucket in buckets:
        start = bucket.timestamp.astimezone(UTC)
        table.add_row(
            cell(f"{start:{FORMAT[granularity] if on_terminal() else '%Y-%m-%dT%H:%M:%SZ'}}"),
            *([_bar(bucket, most)] if bars else []),
            *(cell(getattr(bucket, name) or ".") for name in ("total", *(name for name, _, _ in PARTS))),
            *(
                cell(span(None if value is None else value / 1000))
                for value in (bucket.p50_duration_ms, bucket.p95_duration_ms)
            ),
        )
    print_table(console, table)
    if bars:
        legend = Text("\n")
        for name, mark, style in PARTS:
            legend.append(f"{mark} ", style).append(f"{name}  ")
        total = sum(bucket.total for bucket in buckets)
        console.print(legend.append(f"in all {count(total, 'run')}"))


def _bar(bucket: RunTimeseriesBucket, most: int) -> Text:
    """A bar in proportion to the fullest bucket; every status that occurs gets at least one mark."""
    bar = Text()
    for name, mark, style in PARTS:
        runs = getattr(bucket, name)
        bar.append(mark * (max(1, round(runs * BAR / most)) if runs else 0), style)
    return bar
