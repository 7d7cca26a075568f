"""The command line: ``python -m flowstore_chaos --help``."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flowstore_chaos.line import Line
from flowstore_chaos.lines import load_lines
from flowstore_chaos.outcome import Outcome, run_row
from flowstore_chaos.scorecard import PAGE, document, publish, terminal_table

EXIT_RED = 1
EXIT_USAGE = 2
LOG_WIDTH = 132

_app = typer.Typer(
    add_completion=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)


@_app.command()
def chaos(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="LINE", help="Lines to run, by name or number; all without."),
    ] = None,
    *,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Only rows of this backend: memory, sqlite, postgresql. Repeatable."),
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.0001, max=1000, help="Multiplies how many faults are injected.")
    ] = 1.0,
    planned: Annotated[
        int | None, typer.Option(min=1, help="So many faults for each row, whatever the scale.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeat the choices of an earlier run.")] = None,
    broken: Annotated[
        bool,
        typer.Option(
            "--broken",
            help="Run the broken variants instead, with the fewest faults: each must be found out.",
        ),
    ] = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="Run each row's broken variant too, with the fewest faults.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Rows at once.")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Where databases go; a real disk.", file_okay=False, exists=True)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every count there.")] = None,
    published: Annotated[
        bool, typer.Option("--publish", help=f"Put the rows into {PAGE} (run it in the project's root).")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Say what the lines are, and run nothing.")] = False,
) -> None:
    """Inject faults into stores, and count what is lost, done twice, answered wrongly or leaked.

    Files, servers and processes are made for this and deleted afterwards. No store of yours is touched.

    Exit code 0: every row is as it must be; rows that this machine cannot run are named. 1: a row is red, or
    a broken variant was not found out. 2: the command line makes no sense.

    [bold]Examples[/bold]

    python -m flowstore_chaos --scale 0.02 [dim]# a quick look at everything[/dim]

    python -m flowstore_chaos server-kills --seed 7 [dim]# one line, with the choices of seed 7[/dim]

    python -m flowstore_chaos --broken [dim]# does each line find its broken variant?[/dim]
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        # A log has no width; the table shall not be cut to that of a terminal that is not there.
        console = Console(highlight=False, width=LOG_WIDTH)
    lines = _chosen(names or [], backend or [])
    if listing:
        for line in lines:
            console.print(f"[bold]{line.number:>3}  {line.name}[/bold]  {line.fault}")
            console.print(
                f"     {line.planned:,} {line.unit} on {', '.join(line.backends)}; passes when "
                f"{line.passes_when}",
                style="dim",
            )
        return
    if published and not PAGE.exists():
        _refuse(f"--publish: there is no {PAGE} here; run it in the project's root")
    chosen_seed = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    rows = [
        (line, name, broken) for line in lines for name in line.backends if not backend or name in backend
    ]
    if prove and not broken:
        rows += [(line, name, True) for line, name, _ in rows]
    outcomes = asyncio.run(_run(console, rows, chosen_seed, scale, planned, jobs, folder))
    # The file first: standard output may be closed or full.
    if json_file is not None:
        json_file.write_text(json.dumps(document(outcomes), indent=1) + "\n", encoding="utf-8")
    console.print(terminal_table(outcomes))
    bad = _explain(console, outcomes)
    if published:
        publish(
            [outcome for outcome in outcomes if not outcome.broken],
            [outcome for outcome in outcomes if outcome.broken],
            load_lines(),
            Path(),
        )
        console.print(f"{PAGE} shows these rows now")
    console.print(f"seed {chosen_seed}: {len(outcomes) - bad} of {len(outcomes)} rows are as they must be")
    raise typer.Exit(EXIT_RED if bad else 0)


async def _run(
    console: Console,
    rows: Sequence[tuple[Line, str, bool]],
    seed: int,
    scale: float,
    planned: int | None,
    jobs: int,
    folder: Path | None,
) -> list[Outcome]:
    turns = asyncio.Semaphore(jobs)
    place = folder if folder is not None else Path(tempfile.gettempdir())
    # A log file of a CI job wants lines, a terminal wants to see them move.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    async def row(line: Line, backend: str, is_broken: bool) -> Outcome:
        async with turns:
            amount = planned if planned is not None else line.planned_at(0 if is_broken else scale)
            title = f"{line.number:>2} {line.name} {backend}{' (broken)' if is_broken else ''}"
            task = progress.add_task(title, total=amount)
            outcome = await run_row(
                line,
                backend,
                seed=seed,
                planned=amount,
                broken=is_broken,
                folder=place,
                say=lambda landed: progress.update(task, completed=min(landed, amount)),
            )
            progress.remove_task(task)
            if not console.is_terminal:
                state = "as it must be" if outcome.good else "RED"
                console.print(
                    f"{title}: {outcome.tally.landed:,} {line.unit}, {outcome.seconds:.0f} s, {state}"
                )
            return outcome

    with progress:
        return list(await asyncio.gather(*(row(*one) for one in rows)))


def _explain(console: Console, outcomes: Sequence[Outcome]) -> int:
    """Say what is red and why, what was not run, and how to run it again; how many rows are bad."""
    bad = 0
    for outcome in outcomes:
        if outcome.skipped is not None:
            console.print(
                f"{outcome.line.name} on {outcome.backend} was not run: {outcome.skipped}", style="yellow"
            )
        if outcome.good:
            continue
        bad += 1
        console.print(f"\n{outcome.line.name} on {outcome.backend}:", style="bold red", markup=False)
        if outcome.failure is not None:
            console.print(f"  it broke down: {outcome.failure}", markup=False)
        elif outcome.broken:
            console.print(f"  its broken variant was not found out: {outcome.line.broken}", markup=False)
        elif outcome.tally.landed < outcome.planned:
            console.print(f"  only {outcome.tally.landed} of {outcome.planned} {outcome.line.unit} landed")
        for finding in outcome.tally.findings:
            console.print(f"  {finding}", markup=False)
        console.print(f"  again: {outcome.command}", markup=False)
    return bad


def _chosen(names: Sequence[str], backends: Sequence[str]) -> list[Line]:
    lines = load_lines()
    known = {line.name: line for line in lines} | {str(line.number): line for line in lines}
    if unknown := [name for name in names if name not in known]:
        _refuse(
            f"no line is called {', '.join(unknown)}; there are: {', '.join(line.name for line in lines)}"
        )
    has = {backend for line in lines for backend in line.backends}
    if strange := sorted(set(backends) - has):
        _refuse(f"--backend {', '.join(strange)}: there are {', '.join(sorted(has))}")
    chosen = [known[name] for name in dict.fromkeys(names)] if names else list(lines)
    found = [line for line in dict.fromkeys(chosen) if not backends or set(backends) & set(line.backends)]
    if not found:
        _refuse("none of these lines runs on that backend; --list says which do")
    return found


def _refuse(message: str) -> None:
    sys.stderr.write(f"flowstore_chaos: {message}\n")
    raise typer.Exit(EXIT_USAGE)


if __name__ == "__main__":
    _app(prog_name="python -m flowstore_chaos")
