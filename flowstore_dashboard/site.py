"""What every page needs: the store, the templates, and the bounds of a request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from flowstore_core import Capability, FlowStore, RunNotFoundError, StoreConfig
from flowstore_core.distributions import installed_version
from flowstore_core.inspection.wording import count, span
from flowstore_core.plugins import Backend, Plugin
from flowstore_core.urls import redact
from flowstore_dashboard import wording
from flowstore_dashboard.security import Sessions
from flowstore_dashboard.timeline import WORDS

FOLDER = Path(__file__).parent
MAX_BODY = 1 << 20
"""Maximum size of the body of a request, in bytes."""
MAX_PARAMETER = 512
"""Maximum length of a parameter of an address, in characters."""
MAX_MESSAGES = 1000


@cache
def templates() -> Environment:
    """The templates. Every value is escaped, and a missing one is an error."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        moment=wording.moment, iso=wording.iso, span=span, clock=wording.clock, age=wording.age
    )
    environment.globals.update(count=count, length=wording.length, kind_words=WORDS, version=_version())
    return environment


def compile_templates() -> None:
    """Compile every template, so that the first page need not."""
    for name in templates().list_templates():
        templates().get_template(name)


@cache
def static_version() -> str:
    """A name for the current content of the static files, so that browsers may keep them."""
    digest = hashlib.sha256()
    for path in sorted((FOLDER / "static").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version() -> str:
    return installed_version("flowstore") or ""


@dataclass(slots=True)
class Site:
    """The store of a dashboard, and what its pages share."""

    store: FlowStore
    plugin: Plugin
    backend: Backend
    config: StoreConfig
    sessions: Sessions
    read_only: bool
    _messages: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """The result of the last action of a session, until a page has shown it."""

    @property
    def where(self) -> str:
        """The store's URL, without secrets."""
        return redact(self.config.url)

    def has(self, capability: Capability) -> bool:
        return capability in self.store.capabilities

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        session: str = request.scope["session_id"]
        page = templates().get_template(template)
        # The script's request of a page leaves the message to the person's.
        is_shown = status == 200 and "x-live" not in request.headers
        text = page.render(
            site=self,
            path=request.url.path,
            csrf=self.sessions.csrf_token(session),
            message=self._messages.pop(session, None) if is_shown else None,
            static=static_version(),
            now=datetime.now(UTC),
            **values,
        )
        return HTMLResponse(text, status)

    def done(self, request: Request, path: str, message: str) -> Response:
        """Lead to a page that shows the result of an action, once."""
        self._messages[request.scope["session_id"]] = message
        if len(self._messages) > MAX_MESSAGES:
            self._messages.popitem(last=False)
        return RedirectResponse(path, 303)


def parameter(request: Request, name: str) -> str | None:
    """A parameter of the address; None if it is missing or empty."""
    value = request.query_params.get(name, "").strip()
    if len(value) > MAX_PARAMETER:
        refuse(f"{name} must have at most {MAX_PARAMETER} characters; got {len(value):,}")
    return value or None


def run_of(request: Request) -> UUID:
    """The run id in the path."""
    text = request.path_params["run_id"]
    try:
        return UUID(text)
    except ValueError:
        raise HTTPException(404, "The address does not contain the id of a run.") from None


def not_found(run_id: UUID) -> NoReturn:
    raise RunNotFoundError(run_id)


def refuse(reason: str, status: int = 400) -> NoReturn:
    raise HTTPException(status, reason)


async def read_form(site: Site, request: Request) -> QueryParams:
    """The fields of a form that this dashboard has shown to the same session.

    Refuses any other type of body, one that is too large, and a wrong CSRF token.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        refuse("The body of the request must be a form.", 415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            refuse(f"The form must have at most {MAX_BODY:,} bytes.", 413)
    try:
        form = QueryParams(body.decode("ascii"))
    except UnicodeDecodeError:
        refuse("The form must be URL-encoded.")
    if not site.sessions.csrf_is_right(request.scope["session_id"], form.get("csrf", "")):
        refuse("The form is out of date: reload the page and send it again.", 403)
    return form
