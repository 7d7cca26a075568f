"""``flowstore migrate``: the schema of a store's database."""

from __future__ import annotations

from typing import Annotated

import typer

from flowstore_cli.failures import NO, SUCCESS
from flowstore_cli.printing import print_json, say
from flowstore_cli.stores import AsJson, Url, migrate_schema, new_group, run, whereabouts
from flowstore_core import StoreConfig
from flowstore_core.backend import Migratable
from flowstore_core.inspection.diagnosis import schema_version
from flowstore_core.open import resolve_store
from flowstore_core.plugins import Plugin

app = new_group(
    "Migrate a store's schema, or show its state.\n\n"
    "Of the other commands only replay migrates, and reports it. An application migrates when it opens "
    "the store, unless it passes migrate=False."
)


@app.command()
def up(url: Url = None, as_json: AsJson = False) -> None:
    """Apply missing migrations.

    Creates the schema or the file if necessary. Safe to run at any time, also concurrently.

    \b
      flowstore migrate up
      flowstore migrate up --url postgresql://admin@host/db

    JSON: backend, before, version (numbers; null for a backend that needs no migrations).
    """
    plugin, backend, config = _resolve(url)
    if backend is None:
        _needs_none(plugin.name, as_json, {"before": None, "version": None})
        return
    before, version = run(migrate_schema(plugin, backend, config))
    if as_json:
        print_json({"backend": plugin.name, "before": before, "version": version})
    elif before == version:
        say(f"up to date: version {version} at {whereabouts(config)}")
    else:
        say(f"migrated from version {before} to {version}: {whereabouts(config)}")


@app.command()
def status(url: Url = None, as_json: AsJson = False) -> None:
    """List missing migrations.

    Exit code 1 if there are any.

    \b
      flowstore migrate status && start-the-workers

    JSON: backend, version, latest, pending (a list of number and name).
    """
    plugin, backend, config = _resolve(url)
    if backend is None:
        _needs_none(plugin.name, as_json, {"version": None, "latest": None, "pending": []})
        return
    known = backend.migrations(config)
    version = run(schema_version(plugin, backend, config))
    latest = max((number for number, _, _ in known), default=0)
    pending = [{"number": number, "name": name} for number, name, _ in known if number > version]
    if as_json:
        print_json({"backend": plugin.name, "version": version, "latest": latest, "pending": pending})
    else:
        say(f"version {version} of {latest}: {whereabouts(config)}")
        for entry in pending:
            say(f"  pending  {entry['number']:04}  {entry['name']}")
        if pending:
            say("apply with: flowstore migrate up")
        if version > latest:
            say("the schema is newer than this flowstore supports")
    raise typer.Exit(NO if pending else SUCCESS)


@app.command()
def sql(
    url: Url = None,
    since: Annotated[int, typer.Option("--after", min=0, help="Only migrations after this number.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Print the migrations' SQL, as scripts that apply and record them.

    Review them, or run them with psql or sqlite3. No store is opened.

    \b
      flowstore migrate sql --url postgresql://host/db
      flowstore migrate sql --after 3

    JSON: a list of objects with number, name, sql.
    """
    plugin, backend, config = _resolve(url)
    if backend is None:
        _needs_none(plugin.name, as_json, None)
        return
    known = [entry for entry in backend.migrations(config) if entry[0] > since]
    if as_json:
        print_json([{"number": number, "name": name, "sql": text} for number, name, text in known])
        return
    for number, name, text in known:
        say(f"-- migration {number:04} {name} of backend {plugin.name}")
        say(text.strip() + "\n")


def _resolve(url: str | None) -> tuple[Plugin, Migratable | None, StoreConfig]:
    plugin, backend, config = resolve_store(url)
    return plugin, backend if isinstance(backend, Migratable) else None, config


def _needs_none(name: str, as_json: bool, answer: dict[str, object] | None) -> None:
    if as_json:
        print_json([] if answer is None else {"backend": name, **answer})
    else:
        say(f"backend {name!r} needs no migrations")
