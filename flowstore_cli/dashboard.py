"""``flowstore dashboard``: the store's pages in a browser."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flowstore_cli.failures import USAGE, Failure
from flowstore_cli.printing import say
from flowstore_cli.stores import Url, existing_store, run

TOKEN_VARIABLE = "FLOWSTORE_DASHBOARD_TOKEN"
MODULES = frozenset({"starlette", "uvicorn", "jinja2", "markupsafe"})


def dashboard(
    url: Url = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="The address to listen on; any but a loopback one needs a token."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")
    ] = 8787,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help=f"Ask for this token first; better in {TOKEN_VARIABLE}, which other users cannot see.",
            envvar=TOKEN_VARIABLE,
            show_envvar=False,
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Offer no actions.")] = False,
) -> None:
    """Serve pages that show what the store knows, until Ctrl-C.

    Overview, runs, the timeline of each run, queues, and what flowstore doctor finds. It works offline, on
    every backend, and never migrates the schema. Runs on this machine only, unless --host and a token are
    given. Needs the extra dashboard.

    \b
      flowstore dashboard
      flowstore dashboard --url postgresql://user@host/db --read-only
      FLOWSTORE_DASHBOARD_TOKEN=... flowstore dashboard --host 0.0.0.0
    """
    run(_dashboard(url, host, port, token, read_only))


async def _dashboard(url: str | None, host: str, port: int, token: str | None, read_only: bool) -> None:
    try:
        from flowstore_dashboard.security import MAX_TOKEN, MIN_TOKEN, is_loopback
        from flowstore_dashboard.serve import serving, wait_for_stop
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    if token is not None and not MIN_TOKEN <= len(token) <= MAX_TOKEN:
        raise Failure(f"--token must have {MIN_TOKEN} to {MAX_TOKEN} characters", USAGE)
    if token is None and not is_loopback(host):
        raise Failure(
            f"--host {host} serves other machines too, which needs --token or {TOKEN_VARIABLE}", USAGE
        )
    async with existing_store(url) as store:
        try:
            async with serving(store, url, host=host, port=port, token=token, read_only=read_only) as address:
                say(f"dashboard: {address} (Ctrl-C stops it)")
                sys.stdout.flush()
                await wait_for_stop()
        except OSError as error:
            raise Failure(
                f"cannot listen on {host} port {port}: {error.strerror}; choose another --port",
                USAGE,
            ) from error


def missing_extra(error: ModuleNotFoundError) -> Failure | ModuleNotFoundError:
    """The failure for a module of the extra; any other missing module is a bug."""
    module = (error.name or "").partition(".")[0]
    if module not in MODULES:
        return error
    return Failure(f"module {module!r} is missing; pip install 'flowstore[dashboard]'", USAGE)
