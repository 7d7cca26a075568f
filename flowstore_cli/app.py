"""The application: its command groups, and the mapping of every error to one line and an exit code."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from flowstore_cli import (
    archives,
    backends,
    completion,
    conformance,
    copying,
    dashboard,
    doctor,
    migrate,
    new_backend,
    ping,
    queues,
    replay,
    retention,
    run_events,
    run_tree,
    run_wait,
    run_watch,
    runs,
    signals,
    stats,
    timeseries,
)
from flowstore_cli.failures import EXIT_CODES, INTERRUPTED, NO, SUCCESS, USAGE, Failure, explain
from flowstore_cli.printing import clean, complain
from flowstore_cli.stores import RootUrl
from flowstore_core.distributions import installed_version
from flowstore_core.platforms import require_posix

DEBUG_VARIABLE = "FLOWSTORE_DEBUG"

WITHOUT_URL = ("backends", "conformance", "copy", "new-backend")

# typer bundles click under one of two names, depending on its version; this is the base class of its errors.
UsageProblem: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    name="flowstore",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("backends")(backends.backends)
app.command("conformance")(conformance.conformance)
app.command("new-backend")(new_backend.new_backend)
app.add_typer(migrate.app, name="migrate")
app.command("replay")(replay.replay)
runs.app.command("tree")(run_tree.tree)
runs.app.command("events")(run_events.events)
runs.app.command("watch")(run_watch.watch)
runs.app.command("wait")(run_wait.wait)
runs.app.command("export")(archives.export_runs)
runs.app.command("import")(archives.import_runs)
app.add_typer(runs.app, name="runs")
app.command("queues")(queues.queues)
app.command("stats")(stats.stats)
app.command("timeseries")(timeseries.timeseries)
app.add_typer(signals.app, name="signal")
app.command("copy")(copying.copy)
app.command("cleanup")(retention.cleanup)
app.command("ping")(ping.ping)
app.command("doctor")(doctor.doctor)
app.command("dashboard")(dashboard.dashboard)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flowstore {installed_version('flowstore') or '(not installed)'}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    help=(
        "Inspect, maintain and try out stores of workflow runs.\n\n"
        "The store is the one that --url names, else FLOWSTORE_URL, else key url of flowstore.toml or "
        "[tool.flowstore] of pyproject.toml, else sqlite:///flowstore.db.\n\n\b\n"
        "  flowstore replay --kill 2      run a workflow, kill two workers, and check\n"
        "  flowstore runs list            list the runs in the store\n"
        "  flowstore doctor               find its problems and their remedies\n"
        "  flowstore dashboard            see all of that in a browser\n"
        "  flowstore backends             list the available backends\n\n\b\n" + EXIT_CODES
    ),
)
def flowstore(
    context: typer.Context,
    url: RootUrl = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif url is not None and context.invoked_subcommand in WITHOUT_URL:
        name = context.invoked_subcommand
        raise Failure(f"{name} takes no --url; see: flowstore {name} --help", USAGE)


@functools.cache
def _command() -> Any:
    """The commands as typer builds them, once per process. The class depends on typer's version."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code. Raises no exception."""
    # Warnings of libraries, as one line each.
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    command = _command()
    try:
        require_posix("the command line")
        if completion.VARIABLE in os.environ:
            # A warning would appear in the command line that the user is typing.
            logging.disable()
            command(prog_name="flowstore")
        # Calling the app instead would leave broken pipes and interrupts to typer.
        with command.make_context("flowstore", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    except SystemExit as leaving:
        # typer exits this way after completion.
        return leaving.code if isinstance(leaving.code, int) else SUCCESS
    except UsageProblem as error:
        place = getattr(error, "ctx", None)
        name = place.command_path if place else "flowstore"
        return complain(f"{error.format_message()} (see {name} --help)", USAGE)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - reported as one line
        if explained := explain(error):
            return complain(*explained, getattr(error, "details", ()))
        # Omits the exception's text, which may hold secrets.
        if os.environ.get(DEBUG_VARIABLE):
            sys.stderr.write("".join(_frames(error)))
        text = clean(type(error).__name__)
        return complain(f"this is a bug: {text}; {DEBUG_VARIABLE}=1 shows where, please report it", NO)
    return SUCCESS


def _frames(error: BaseException) -> Iterator[str]:
    """The lines of a traceback, with the classes of the exceptions and without their texts."""
    chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if chained is not None:
        yield from _frames(chained)
        yield "which led to:\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__name__}\n"
