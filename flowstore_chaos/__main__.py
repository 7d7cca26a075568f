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

from flowstore_chaos.result import ScenarioResult, run_scenario
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios import load_scenarios
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
        typer.Argument(metavar="SCENARIO", help="Scenarios to run, by name or number; default: all."),
    ] = None,
    *,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Only rows of this backend: memory, sqlite, postgresql. Repeatable."),
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.0001, max=1000, help="Factor for the number of faults.")
    ] = 1.0,
    planned: Annotated[
        int | None, typer.Option(min=1, help="Number of faults for each row; overrides --scale.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeat the random choices of an earlier run.")] = None,
    mutant: Annotated[
        bool,
        typer.Option(
            "--mutants",
            help="Run the mutants instead, with the minimum of faults: each must be detected.",
        ),
    ] = False,
    with_mutants: Annotated[
        bool, typer.Option("--with-mutants", help="Run each row's mutant too, with the minimum of faults.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Number of concurrent rows.")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for databases, on a real disk.", file_okay=False, exists=True)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all counts to this file.")] = None,
    publish_page: Annotated[
        bool, typer.Option("--publish", help=f"Publish the rows in {PAGE} (from the project's root).")
    ] = False,
    list_scenarios: Annotated[bool, typer.Option("--list", help="List the scenarios and exit.")] = False,
) -> None:
    """Inject faults into stores, and count lost operations, duplicates, wrong results and leaks.

    The command creates its own files, servers and processes and deletes them. It touches no other store.

    Exit code 0: all rows are as expected; skipped rows are named. 1: a row failed, or a mutant was not
    detected. 2: invalid command line.

    [bold]Examples[/bold]

    python -m flowstore_chaos --scale 0.02 [dim]# a short run of all scenarios[/dim]

    python -m flowstore_chaos server-kills --seed 7 [dim]# one scenario, with seed 7[/dim]

    python -m flowstore_chaos --mutants [dim]# does each scenario detect its mutant?[/dim]
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        # A log has no terminal width to which the table must be cut.
        console = Console(highlight=False, width=LOG_WIDTH)
    scenarios = _select(names or [], backend or [])
    if list_scenarios:
        for scenario in scenarios:
            console.print(f"[bold]{scenario.number:>3}  {scenario.name}[/bold]  {scenario.fault}")
            console.print(
                f"     {scenario.planned:,} {scenario.unit} on {', '.join(scenario.backends)}; passes when "
                f"{scenario.pass_criterion}",
                style="dim",
            )
        return
    if publish_page and not PAGE.exists():
        _usage_error(f"--publish: {PAGE} does not exist; run it in the project's root")
    chosen_seed = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    rows = [
        (scenario, name, mutant)
        for scenario in scenarios
        for name in scenario.backends
        if not backend or name in backend
    ]
    if with_mutants and not mutant:
        rows += [(scenario, name, True) for scenario, name, _ in rows]
    results = asyncio.run(_run(console, rows, chosen_seed, scale, planned, jobs, folder))
    # Write the file first: standard output may be closed or full.
    if json_file is not None:
        json_file.write_text(json.dumps(document(results), indent=1) + "\n", encoding="utf-8")
    console.print(terminal_table(results))
    unexpected = _print_failures(console, results)
    if publish_page:
        publish(
            [result for result in results if not result.is_mutant],
            [result for result in results if result.is_mutant],
            load_scenarios(),
            Path(),
        )
        console.print(f"published in {PAGE}")
    console.print(f"seed {chosen_seed}: {len(results) - unexpected} of {len(results)} rows are as expected")
    raise typer.Exit(EXIT_RED if unexpected else 0)


async def _run(
    console: Console,
    rows: Sequence[tuple[FaultScenario, str, bool]],
    seed: int,
    scale: float,
    planned: int | None,
    jobs: int,
    folder: Path | None,
) -> list[ScenarioResult]:
    slots = asyncio.Semaphore(jobs)
    database_folder = folder if folder is not None else Path(tempfile.gettempdir())
    # Progress bars on a terminal, lines in a log file.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    async def row(scenario: FaultScenario, backend: str, is_mutant: bool) -> ScenarioResult:
        async with slots:
            amount = planned if planned is not None else scenario.planned_at(0 if is_mutant else scale)
            title = f"{scenario.number:>2} {scenario.name} {backend}{' (mutant)' if is_mutant else ''}"
            task = progress.add_task(title, total=amount)
            result = await run_scenario(
                scenario,
                backend,
                seed=seed,
                planned=amount,
                is_mutant=is_mutant,
                folder=database_folder,
                on_progress=lambda injected: progress.update(task, completed=min(injected, amount)),
            )
            progress.remove_task(task)
            if not console.is_terminal:
                state = "as expected" if result.as_expected else "UNEXPECTED"
                console.print(
                    f"{title}: {result.counts.injected:,} {scenario.unit}, {result.seconds:.0f} s, {state}"
                )
            return result

    with progress:
        return list(await asyncio.gather(*(row(*one) for one in rows)))


def _print_failures(console: Console, results: Sequence[ScenarioResult]) -> int:
    """Print unexpected and skipped rows with reason and command. Returns the number of unexpected rows."""
    unexpected = 0
    for result in results:
        if result.skipped is not None:
            console.print(
                f"{result.scenario.name} on {result.backend} was not run: {result.skipped}", style="yellow"
            )
        if result.as_expected:
            continue
        unexpected += 1
        console.print(f"\n{result.scenario.name} on {result.backend}:", style="bold red", markup=False)
        if result.failure is not None:
            console.print(f"  failed to run: {result.failure}", markup=False)
        elif result.is_mutant:
            console.print(f"  the mutant was not detected: {result.scenario.mutant}", markup=False)
        elif result.counts.injected < result.planned:
            console.print(
                f"  only {result.counts.injected} of {result.planned} {result.scenario.unit} injected"
            )
        for finding in result.counts.findings:
            console.print(f"  {finding}", markup=False)
        console.print(f"  repeat: {result.command}", markup=False)
    return unexpected


def _select(names: Sequence[str], backends: Sequence[str]) -> list[FaultScenario]:
    scenarios = load_scenarios()
    known = {scenario.name: scenario for scenario in scenarios}
    known |= {str(scenario.number): scenario for scenario in scenarios}
    if unknown := [name for name in names if name not in known]:
        available = ", ".join(scenario.name for scenario in scenarios)
        _usage_error(f"unknown scenario {', '.join(unknown)}; scenarios: {available}")
    known_backends = {backend for scenario in scenarios for backend in scenario.backends}
    if unknown_backends := sorted(set(backends) - known_backends):
        available = ", ".join(sorted(known_backends))
        _usage_error(f"--backend {', '.join(unknown_backends)}: backends are {available}")
    chosen = [known[name] for name in dict.fromkeys(names)] if names else list(scenarios)
    selected = [one for one in dict.fromkeys(chosen) if not backends or set(backends) & set(one.backends)]
    if not selected:
        _usage_error("no selected scenario runs on that backend; see --list")
    return selected


def _usage_error(message: str) -> None:
    sys.stderr.write(f"flowstore_chaos: {message}\n")
    raise typer.Exit(EXIT_USAGE)


if __name__ == "__main__":
    _app(prog_name="python -m flowstore_chaos")
