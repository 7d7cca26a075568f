"""``flowstore replay``: run a recorded workflow on worker processes, and kill some of them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from flowstore_cli.failures import NO, SUCCESS
from flowstore_cli.printing import cell, clean, new_console, print_form, print_json, say, unfolded
from flowstore_cli.screens import Moving, Plain, Quiet, Screen
from flowstore_cli.stores import AsJson, NoMigrate, Url, migrate_schema, run, whereabouts
from flowstore_core import StoreConfig
from flowstore_core.backend import Migratable
from flowstore_core.inspection.diagnosis import schema_version
from flowstore_core.inspection.wording import count, span
from flowstore_core.open import resolve_store
from flowstore_core.plugins import Plugin
from flowstore_core.urls import redact
from flowstore_replay import Options, Replay, Summary, load_workflow, shipped_workflow

DEFAULTS = Options()
MOST_SHOWN = 10


def replay(
    workflow: Annotated[
        Path | None,
        typer.Argument(
            metavar="WORKFLOW",
            help="A file in WfFormat 1.5; default: a small built-in one.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, max=256, help="Worker processes.")
    ] = DEFAULTS.workers,
    runs: Annotated[
        int, typer.Option(min=1, max=10_000, help="Number of concurrent runs of the workflow.")
    ] = DEFAULTS.runs,
    speed: Annotated[
        float, typer.Option(min=0.001, help="Divisor of the recorded durations.")
    ] = DEFAULTS.speed,
    kill: Annotated[
        int, typer.Option(min=0, help="Workers to kill (SIGKILL) midway; others replace them.")
    ] = DEFAULTS.kill,
    fail_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Probability that an attempt fails.")
    ] = DEFAULTS.fail_rate,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="Failed attempts after which a step fails its run.")
    ] = DEFAULTS.max_attempts,
    lease: Annotated[
        float, typer.Option(min=0.2, max=3600, help="Seconds until a dead worker's step is taken over.")
    ] = DEFAULTS.lease,
    approve: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="A step that waits for a signal; repeatable.")
    ] = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Wait for you to approve, and print the command for it.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random failures.")] = DEFAULTS.seed,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds until it gives up. Default: 300; none with --hold."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the replay; the same name continues its runs."),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
    no_migrate: NoMigrate = False,
) -> None:
    """Run a workflow on workers, kill some, and verify the result.

    Each worker is a separate process that claims steps in the store, sleeps for the recorded duration of
    each, and records its result. The verification reads only the store. Exit code 0 only if every run
    succeeded, every step exactly once, and every attempt is accounted for.

    \b
      flowstore replay
      flowstore replay --workers 4 --kill 2 instance.json
      flowstore replay --runs 20 --fail-rate 0.1 --url postgresql://user@host/db
      flowstore replay --approve publish --hold

    JSON: workflow, store, key, run_ids, ok, runs, runs_succeeded, steps, steps_succeeded,
    steps_per_second, seconds, attempts, attempts_by_outcome, workers_killed, kills, steps_recovered,
    takeovers, checks, notes.
    """
    recorded = load_workflow(workflow) if workflow else shipped_workflow()
    if timeout is None and not hold:
        timeout = DEFAULTS.timeout
    options = Options(
        workers=workers,
        runs=runs,
        speed=speed,
        kill=kill,
        fail_rate=fail_rate,
        lease=lease,
        max_attempts=max_attempts,
        approval_steps=tuple(approve or ()),
        hold=hold,
        seed=seed,
        timeout=timeout,
        key=key,
    )
    plugin, backend, config = resolve_store(url, migrate=not no_migrate)
    place = whereabouts(config)
    console = new_console()
    screen: Screen = Quiet() if as_json else Moving(console) if console.is_terminal else Plain()
    one = Replay(recorded, options, screen, url=url, migrate=config.migrate)
    if config.migrate and isinstance(backend, Migratable):
        run(_migrate(plugin, backend, config, place))
    if not as_json:
        size = f"{count(runs, 'run')} of {count(len(recorded.tasks), 'step')}"
        say(f"replaying {recorded.name!r}: {size}, {count(workers, 'worker')}, {speed:g} times as fast")
        say(f"store: {place}")
    try:
        with screen.on():
            summary = run(one.run())
    except KeyboardInterrupt:
        if one.run_ids:
            again = _again(workflow, options, one.key, url)
            _report(f"the runs stay in the store; continue them with: {again}")
        raise
    if as_json:
        print_json(_document(summary, one, place, screen.notes))
    else:
        _print_summary(console, summary, one)
    raise typer.Exit(SUCCESS if summary.ok else NO)


async def _migrate(plugin: Plugin, backend: Migratable, config: StoreConfig, place: str) -> None:
    latest = max((number for number, _, _ in backend.migrations(config)), default=0)
    if await schema_version(plugin, backend, config) >= latest:
        return
    before, version = await migrate_schema(plugin, backend, config)
    if before:
        _report(f"migrated the schema of {place} from version {before} to {version}")
    else:
        _report(f"created the schema of {place}, version {version}")


def _report(text: str) -> None:
    sys.stderr.write(f"{clean(text)}\n")


def _again(workflow: Path | None, options: Options, key: str, url: str | None) -> str:
    words = ["flowstore", "replay", *([str(workflow)] if workflow else []), "--key", key]
    words += ["--runs", str(options.runs)] if options.runs > 1 else []
    words += [word for step in options.approval_steps for word in ("--approve", step)]
    words += ["--url", redact(url)] if url else []
    return clean(shlex.join(words))


def _document(summary: Summary, one: Replay, place: str, notes: list[str]) -> dict[str, Any]:
    return {
        "workflow": summary.workflow,
        "store": place,
        "key": one.key,
        "run_ids": one.run_ids,
        "ok": summary.ok,
        "runs": summary.runs,
        "runs_succeeded": summary.runs_succeeded,
        "steps": summary.steps,
        "steps_succeeded": summary.steps_succeeded,
        "steps_per_second": round(summary.steps_per_second, 3),
        "seconds": summary.seconds,
        "attempts": summary.attempts,
        "attempts_by_outcome": summary.attempts_by_outcome,
        "workers_killed": len(summary.kills),
        "kills": summary.kills,
        "steps_recovered": summary.steps_recovered,
        "takeovers": summary.takeovers,
        "checks": [
            {"name": check.name, "ok": check.ok, "findings": check.findings, "count": check.count}
            for check in summary.checks
        ],
        "notes": notes,
    }


def _print_summary(console: Console, summary: Summary, one: Replay) -> None:
    outcomes = ", ".join(
        f"{number} {name.replace('_', ' ')}"
        for name, number in summary.attempts_by_outcome.items()
        if number or name != "skipped"
    )
    done = f"{summary.steps_succeeded} of {summary.steps} succeeded"
    speed = f"{summary.steps_per_second:.1f} a second"
    facts = [
        ("runs", cell(f"{summary.runs_succeeded} of {summary.runs} succeeded")),
        ("steps", cell(f"{done} in {span(summary.seconds)}, {speed}")),
        ("attempts", cell(f"{summary.attempts}: {outcomes}")),
        ("killed", cell(count(len(summary.kills), "worker"))),
    ]
    held = ((kill.worker, repr(kill.step_key) if kill.step_key else "nothing") for kill in summary.kills)
    facts += [("", cell(f"{worker}, holding {step}")) for worker, step in list(held)[:MOST_SHOWN]]
    facts.append(("recovered", cell(count(summary.steps_recovered, "step"))))
    for takeover in summary.takeovers[:MOST_SHOWN]:
        change = f"taken over from {takeover.from_worker} by {takeover.to_worker}"
        facts.append(("", cell(f"{takeover.step_key!r}, {change}")))
    for check in summary.checks:
        mark = ("ok      ", "green") if check.ok else ("FAILED  ", "bold red")
        facts.append(("check", Text.assemble(mark, check.name)))
        facts += [("", cell(f"- {finding}", "red")) for finding in check.findings]
        if check.count > len(check.findings):
            facts.append(("", cell(f"- and {check.count - len(check.findings)} more", "red")))
    facts.append(("inspect", unfolded(f"flowstore runs show {one.run_ids[0]}")))
    console.print()
    print_form(console, facts)
