"""Access to the dashboard: the Host header, sessions, CSRF tokens and response headers."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import traceback
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

MIN_TOKEN = 16
"""Minimum length of a token, in characters."""
MAX_TOKEN = 256
MAX_HEADERS = 32 * 1024
"""Maximum size of the headers of a request, in bytes."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WITHOUT_LOGIN = ("/login", "/static/")
"""The paths that are served before the login."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def is_loopback(host: str) -> bool:
    try:
        return host.lower() in LOOPBACK_NAMES or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostNames:
    """The values of the Host header that a server accepts, against DNS rebinding.

    A page of another site cannot choose the Host header: its browser sends the name of that site. A server
    on every address (0.0.0.0 or ::) accepts addresses and the machine's own name.
    """

    def __init__(self, host: str) -> None:
        self._names = {*LOOPBACK_NAMES, host.lower()}
        self._accepts_addresses = host in ("0.0.0.0", "::", "")
        if self._accepts_addresses:
            self._names.add(socket.gethostname().lower())

    def accepts(self, header: str) -> bool:
        name = _without_port(header).lower()
        if name in self._names:
            return True
        if not self._accepts_addresses:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _without_port(header: str) -> str:
    """The name or address of a Host header; an empty text for a malformed one."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]*))(?::\d+)?", header)
    return (match[1] or match[2]) if match else ""


class Sessions:
    """Signed session cookies and the CSRF tokens that belong to them.

    A session is a random id with a signature, so the server keeps none. The key is new for every process: a
    restart ends all sessions.
    """

    def __init__(self, token: str | None) -> None:
        self._key = secrets.token_bytes(32)
        self._token = token

    @property
    def needs_login(self) -> bool:
        return self._token is not None

    def new(self, *, logged_in: bool) -> str:
        number = secrets.token_urlsafe(18)
        kind = "user" if logged_in else "guest"
        return f"{number}.{kind}.{self._sign(f'session {kind} {number}')}"

    def is_valid(self, session: str) -> bool:
        number, _, rest = session.partition(".")
        kind, _, signature = rest.partition(".")
        return _equal(signature, self._sign(f"session {kind} {number}"))

    def may_enter(self, session: str) -> bool:
        """Whether a valid session may see the store."""
        return not self.needs_login or session.split(".")[1] == "user"

    def token_is_right(self, token: str) -> bool:
        return self._token is not None and _equal(token, self._token)

    def csrf_token(self, session: str) -> str:
        return self._sign(f"csrf {session}")

    def csrf_is_right(self, session: str, token: str) -> bool:
        return _equal(token, self.csrf_token(session))

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def cookie_name(scope: Scope) -> str:
    """The cookie's name, with the port: browsers share cookies between the ports of a host."""
    server = scope.get("server")
    return f"flowstore-dashboard-{server[1] if server else 0}"


def session_cookie(scope: Scope, session: str) -> str:
    """The Set-Cookie header of a session."""
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    return f"{cookie_name(scope)}={session}; Path=/; HttpOnly; SameSite=Strict{secure}"


class Guard:
    """Checks the Host header and the session of every request, and sets the headers of every response."""

    def __init__(self, app: ASGIApp, hosts: HostNames, sessions: Sessions) -> None:
        self._app, self._hosts, self._sessions = app, hosts, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request = Headers(scope=scope)
        new_session: str | None = None

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["cache-control"] = "no-store"
                if new_session is not None and "set-cookie" not in headers:
                    headers["set-cookie"] = session_cookie(scope, new_session)
            await send(message)

        response: ASGIApp
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            response = PlainTextResponse("The headers of the request are too large.", 431)
            await response(scope, receive, send_guarded)
            return
        if not self._hosts.accepts(request.get("host", "")):
            response = PlainTextResponse("This dashboard does not serve the host of the request.", 421)
            await response(scope, receive, send_guarded)
            return
        session = _read_cookie(request, cookie_name(scope))
        if session is None or not self._sessions.is_valid(session):
            session = new_session = self._sessions.new(logged_in=False)
        scope["session_id"] = session
        if not self._sessions.may_enter(session) and not scope["path"].startswith(WITHOUT_LOGIN):
            response = RedirectResponse("/login", 303)
            if scope["method"] not in ("GET", "HEAD"):
                response = PlainTextResponse("Log in first.", 403)
            await response(scope, receive, send_guarded)
            return
        try:
            await self._app(scope, receive, send_guarded)
        except Exception as error:  # noqa: BLE001 - the browser has an answer; the log gets no data of a run
            frames = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s while answering %s\n%s", type(error).__name__, scope["path"], frames)


def _read_cookie(headers: Headers, name: str) -> str | None:
    cookie: SimpleCookie = SimpleCookie()
    try:
        cookie.load(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookie[name].value if name in cookie else None
