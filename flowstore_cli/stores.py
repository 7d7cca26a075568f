"""Opening the store that a command works on, and the options that every such command has."""

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
from flowstore_core.open import resolve_store
from flowstore_core.plugins import Plugin, load_error, load_plugins
from flowstore_core.urls import redact
from flowstore_core.validation import MAX_TEXT_BYTES

T = TypeVar("T")


def complete_url(incomplete: str) -> list[str]:
    """The beginnings of the URLs that can be opened here."""
    schemes = {scheme for plugin in load_plugins() for one in plugin.backends for scheme in one.schemes}
    starts = sorted(f"{scheme}://{'/' if scheme == 'sqlite' else ''}" for scheme in schemes)
    return [start for start in starts if start.startswith(incomplete)]


def _given_once(context: typer.Context, url: str | None) -> str | None:
    """The URL of this command, else the one in front of it; both may be given if they are the same."""
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
AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")]
NoMigrate = Annotated[
    bool, typer.Option("--no-migrate", help="Leave the schema as it is; an old one is then an error.")
]


def new_group(text: str) -> typer.Typer:
    """A group of commands; alone it shows its help."""
    app = typer.Typer(rich_markup_mode=None)

    @app.callback(invoke_without_command=True, help=text)
    def group(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return app


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it, so that what it opened is closed."""

    async def supervised() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return await work

    # Ctrl-C waits until the loop is complete: it would leave half a loop, and warnings about it.
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
    """Open a store as it is: neither it nor its schema is created or migrated.

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
                f"the schema at {whereabouts(config)} has version {error.found}, this flowstore works on "
                f"{error.needed}; bring it up to date with"
                if error.found
                else f"there is no flowstore schema at {whereabouts(config)}; check --url, or create one with"
            )
            raise Failure(f"{problem}: {with_url('flowstore migrate up', url)}", USAGE) from error
        yield store


async def migrate_schema(plugin: Plugin, backend: Migratable, config: StoreConfig) -> tuple[int, int]:
    """Apply the missing migrations; the versions before and after."""
    before = await schema_version(plugin, backend, config)
    try:
        return before, await backend.migrate(config)
    except ModuleNotFoundError as error:
        raise missing_driver(plugin, error) from error


def with_url(command: str, url: str | None) -> str:
    """A command line of our own for the store that the user named; URL stands for one with secrets."""
    if url is None:
        return command
    return f"{command} --url {shlex.quote(url) if redact(url) == url else 'URL'}"


async def schema_version(plugin: Plugin, backend: Migratable, config: StoreConfig) -> int:
    """The backend's schema version; a missing driver is told with its remedy."""
    try:
        return await backend.schema_version(config)
    except ModuleNotFoundError as error:
        raise missing_driver(plugin, error) from error


def missing_driver(plugin: Plugin, error: ModuleNotFoundError) -> BackendLoadError:
    return load_error(plugin.name, plugin.module, plugin.distribution, error)


def whereabouts(config: StoreConfig) -> str:
    """Where a store is, for people: its URL without secrets, and the file if it is one."""
    shown = redact(config.url)
    if config.scheme == "sqlite":
        # Without a working directory a relative path leads nowhere, which opening the store explains.
        with contextlib.suppress(OSError):
            return f"{shown} (file {Path(config.parts.path).absolute()})"
    return shown


def drivers(source: object) -> tuple[str, ...]:
    """The modules that a backend, or a wrapper's module, says it needs (the attribute ``drivers``)."""
    named = getattr(source, "drivers", ())
    return tuple(named) if isinstance(named, (tuple, list, frozenset, set)) else ()


def read_stdin() -> str:
    """All of standard input as text. Raises Failure where it is empty, too long or not UTF-8."""
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
