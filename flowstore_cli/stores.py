"""Opening the store of a command, and the options that these commands share."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from flowstore_cli.failures import USAGE, Failure
from flowstore_core import BackendLoadError, FlowStore, SchemaVersionError, StoreConfig, open_store
from flowstore_core.backend import Migratable
from flowstore_core.inspection.diagnosis import schema_version
from flowstore_core.open import resolve_store
from flowstore_core.plugins import Plugin, load_error, load_plugins
from flowstore_core.urls import redact
from flowstore_core.validation import MAX_TEXT_BYTES

T = TypeVar("T")


def complete_url(incomplete: str) -> list[str]:
    """The beginnings of URLs with an installed backend."""
    schemes = {scheme for plugin in load_plugins() for one in plugin.backends for scheme in one.schemes}
    starts = sorted(f"{scheme}://{'/' if scheme == 'sqlite' else ''}" for scheme in schemes)
    return [start for start in starts if start.startswith(incomplete)]


def _given_once(context: typer.Context, url: str | None) -> str | None:
    """The --url of this command, else that of the main command; both may be given if they are equal."""
    in_front = context.find_root().params.get("url")
    if url is not None and in_front is not None and url != in_front:
        raise Failure("--url is given twice, with different stores; leave one of them out", USAGE)
    return in_front if url is None else url


URL_HELP = "The store, such as sqlite:///flows.db or postgresql://user@host/db."
RootUrl = Annotated[
    str | None,
    typer.Option(
        "--url", "-u", metavar="URL", help=URL_HELP, show_default=False, autocompletion=complete_url
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        metavar="URL",
        help=URL_HELP,
        show_default=False,
        autocompletion=complete_url,
        callback=_given_once,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoMigrate = Annotated[
    bool, typer.Option("--no-migrate", help="Do not migrate the schema; an old one is then an error.")
]


def new_group(text: str) -> typer.Typer:
    """A group of commands, which prints its help when called without one."""
    app = typer.Typer(rich_markup_mode=None)

    @app.callback(invoke_without_command=True, help=text)
    def group(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return app


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it, so that its store is closed."""

    async def supervised() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return await work

    # Block Ctrl-C until the loop is set up; a partly created loop would emit warnings.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return asyncio.run(supervised())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work.close()


@asynccontextmanager
async def existing_store(url: str | None) -> AsyncIterator[FlowStore]:
    """Open an existing store without creating or migrating anything.

    Raises Failure, with the command that does it, where there is no schema or an older one.
    """
    _, _, config = resolve_store(url, migrate=False)
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(open_store(url, migrate=False))
        except SchemaVersionError as error:
            if error.found >= error.needed:
                raise
            problem = (
                f"the schema at {whereabouts(config)} has version {error.found}, this flowstore supports "
                f"{error.needed}; bring it up to date with"
                if error.found
                else f"there is no flowstore schema at {whereabouts(config)}; check --url, or create one with"
            )
            raise Failure(f"{problem}: {with_url('flowstore migrate up', url)}", USAGE) from error
        yield store


async def migrate_schema(plugin: Plugin, backend: Migratable, config: StoreConfig) -> tuple[int, int]:
    """Apply missing migrations; return the versions before and after."""
    before = await schema_version(plugin, backend, config)
    try:
        return before, await backend.migrate(config)
    except ModuleNotFoundError as error:
        raise missing_driver(plugin, error) from error


def with_url(command: str, url: str | None) -> str:
    """A flowstore command with the user's --url; a URL with secrets is replaced by the word URL."""
    if url is None:
        return command
    return f"{command} --url {shlex.quote(url) if redact(url) == url else 'URL'}"


def missing_driver(plugin: Plugin, error: ModuleNotFoundError) -> BackendLoadError:
    return load_error(plugin.name, plugin.module, plugin.distribution, error)


def whereabouts(config: StoreConfig) -> str:
    """The location of a store: its URL without secrets, and the path of a SQLite file."""
    shown = redact(config.url)
    if config.scheme == "sqlite":
        # A relative path needs a working directory; opening the store reports a missing one.
        with contextlib.suppress(OSError):
            return f"{shown} (file {Path(config.parts.path).absolute()})"
    return shown


def drivers(source: object) -> tuple[str, ...]:
    """The modules that a backend or a wrapper needs, from its attribute ``drivers``."""
    named = getattr(source, "drivers", ())
    return tuple(named) if isinstance(named, (tuple, list, frozenset, set)) else ()


def read_stdin() -> str:
    """Read standard input as text. Raises Failure if it is empty, too long or not UTF-8."""
    try:
        data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise Failure(f"standard input cannot be read: {error.strerror}", USAGE) from error
    if not data:
        raise Failure("standard input is empty or closed; pipe the text into it", USAGE)
    if len(data) > MAX_TEXT_BYTES:
        raise Failure(f"standard input must have at most {MAX_TEXT_BYTES:,} bytes", USAGE)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Failure(f"standard input must be UTF-8, and its byte {error.start:,} is not", USAGE) from error
