"""HTTP without a browser: requests that no browser would send."""

from __future__ import annotations

import asyncio
import http.client
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """With names in lower case."""
    text: str

    @property
    def cookie(self) -> str | None:
        """The name and value of the cookie that the answer sets."""
        header = self.headers.get("set-cookie")
        return header.partition(";")[0] if header else None

    @property
    def csrf(self) -> str:
        """The CSRF token of the form of a page."""
        found = re.search(r'name="csrf" value="([0-9a-f]+)"', self.text)
        assert found is not None
        return found[1]


class Client:
    """Sends requests to a server of this event loop, each on its own connection."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.send("GET", path, headers)

    async def post(self, path: str, fields: Mapping[str, str], **headers: str) -> Answer:
        form = {"content-type": "application/x-www-form-urlencoded"}
        return await self.send("POST", path, {**form, **headers}, urlencode(fields).encode())

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Answer:
        return await asyncio.to_thread(self._send, method, path, headers, body)

    def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read().decode())
        finally:
            connection.close()
