"""The application: its routes, and the page of every error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flowstore_core import (
    ConflictError,
    FlowStore,
    FlowStoreError,
    InvalidArgumentError,
    NotSupportedError,
    RunNotFoundError,
    StepNotFoundError,
    StoreUnavailableError,
)
from flowstore_core.open import resolve_store
from flowstore_dashboard.actions import Actions
from flowstore_dashboard.health import HealthPage
from flowstore_dashboard.live import Streams
from flowstore_dashboard.overview import OverviewPage
from flowstore_dashboard.queues import QueuesPage
from flowstore_dashboard.run import RunPage
from flowstore_dashboard.runs import RunsPage
from flowstore_dashboard.security import Guard, HostNames, Sessions, session_cookie
from flowstore_dashboard.site import FOLDER, Site, compile_templates, read_form, refuse

STATUS_OF_ERROR: tuple[tuple[type[FlowStoreError], int], ...] = (
    (RunNotFoundError, 404),
    (StepNotFoundError, 404),
    (ConflictError, 409),
    (InvalidArgumentError, 400),
    (NotSupportedError, 404),
    (StoreUnavailableError, 503),
)
CONTENT_TYPES = {"dashboard.css": "text/css", "dashboard.js": "text/javascript"}


def create_app(
    store: FlowStore,
    url: str | None = None,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    read_only: bool = False,
) -> tuple[ASGIApp, Streams]:
    """The dashboard of an open store as an ASGI application, and its live streams.

    ``url`` is the store's URL, as it was given to open_store; ``host`` the address of the server, which
    requests may name. With ``token`` a person has to enter it first. Close the streams before the server
    waits for its connections.
    """
    plugin, backend, config = resolve_store(url, migrate=False)
    compile_templates()
    sessions = Sessions(token)
    site = Site(store, plugin, backend, config, sessions, read_only)
    streams = Streams()
    overview, runs, run, queues = OverviewPage(site), RunsPage(site), RunPage(site), QueuesPage(site)
    health = HealthPage(site)
    routes = [
        Route("/static/{version}/{name}", _static),
        Route("/login", _login_form(site), methods=["GET"]),
        Route("/login", _login(site), methods=["POST"]),
        Route(health.path, health.show),
        *Actions(site).routes(),
    ]
    for page in (overview, runs, run, queues):
        routes += [Route(page.path, page.show), Route(f"/live{page.path}", _live(streams, page))]
    app = Starlette(
        routes=routes,
        exception_handlers={
            FlowStoreError: _store_error(site),
            HTTPException: _http_error(site),
            Exception: _unexpected_error(site),
        },
    )
    return Guard(app, HostNames(host), sessions), streams


def _live(streams: Streams, page: Any) -> Callable[[Request], Any]:
    async def live(request: Request) -> Response:
        return streams.open(page, request)

    return live


_STATIC = {name: ((FOLDER / "static" / name).read_bytes(), kind) for name, kind in CONTENT_TYPES.items()}


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        refuse("There is no such file.", 404)
    content, kind = _STATIC[name]
    # The version in the path changes with the content.
    return Response(
        content, media_type=kind, headers={"cache-control": "public, max-age=31536000, immutable"}
    )


def _login_form(site: Site) -> Callable[[Request], Any]:
    async def show(request: Request) -> Response:
        if site.sessions.may_enter(request.scope["session_id"]):
            return RedirectResponse("/", 303)
        return site.render(request, "login.html", problem=None)

    return show


def _login(site: Site) -> Callable[[Request], Any]:
    async def login(request: Request) -> Response:
        form = await read_form(site, request)
        if not site.sessions.token_is_right(form.get("token", "").strip()):
            return site.render(request, "login.html", 403, problem="This is not the token.")
        # A new session, so that nobody can know it from before the login.
        cookie = session_cookie(request.scope, site.sessions.new(logged_in=True))
        return RedirectResponse("/", 303, {"set-cookie": cookie})

    return login


def _store_error(site: Site) -> Callable[[Request, Exception], Any]:
    async def show(request: Request, error: Exception) -> Response:
        assert isinstance(error, FlowStoreError)
        status = next((number for kind, number in STATUS_OF_ERROR if isinstance(error, kind)), 500)
        return site.render(request, "error.html", status, number=status, reason=str(error))

    return show


def _http_error(site: Site) -> Callable[[Request, Exception], Any]:
    async def show(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = error.detail if error.status_code != 404 or " " in error.detail else "There is no such page."
        return site.render(request, "error.html", error.status_code, number=error.status_code, reason=reason)

    return show


def _unexpected_error(site: Site) -> Callable[[Request, Exception], Any]:
    async def show(request: Request, error: Exception) -> Response:
        # The exception's text stays out of the page: it may contain anything.
        reason = f"This is a bug of the dashboard: {type(error).__name__}. Please report it."
        return site.render(request, "error.html", 500, number=500, reason=reason)

    return show
