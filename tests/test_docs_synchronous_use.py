"""The application of docs/synchronous-use.md, as written: Flask on an HTTP server, and a pool of workers."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from uuid import uuid4

import pytest

from flowstore_core import Capability

pytest.importorskip("flask")
from werkzeug.serving import make_server

PAGE = (Path(__file__).parents[1] / "docs" / "synchronous-use.md").read_text(encoding="utf-8")
SCRIPT, *APPLICATION = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
CLIENTS = 16
SECONDS = 60.0

pytestmark = pytest.mark.needs(Capability.QUEUES, Capability.WATCH)


class Client:
    """An HTTP client of the application."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        data = json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._send(urllib.request.Request(self._url + path, data, names))

    def get(self, path: str) -> tuple[int, Any]:
        return self._send(urllib.request.Request(self._url + path))

    def _send(self, request: urllib.request.Request) -> tuple[int, Any]:
        # Without the proxy that the environment may name.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        response: HTTPResponse | HTTPError
        try:
            response = opener.open(request, timeout=SECONDS)
        except HTTPError as error:
            response = error
        with response:
            return response.status or 0, json.load(response)


@pytest.fixture
def application(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Everything that the page defines, with its store open on the namespace."""
    monkeypatch.setenv("FLOWSTORE_URL", namespace)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile("\n\n".join(APPLICATION), "synchronous-use.md", "exec"), names)
    page = SimpleNamespace(**names)
    with page.store:
        yield page


@pytest.fixture
def client(application: SimpleNamespace) -> Iterator[Client]:
    server = make_server("127.0.0.1", 0, application.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Client(server.server_port)
    server.shutdown()
    thread.join(SECONDS)
    server.server_close()


@pytest.fixture
def workers(application: SimpleNamespace) -> Iterator[None]:
    """Four threads of a pool that execute the steps, as Celery's pool of threads does."""
    stopping = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(application.work, stopping) for _ in range(4)]
        try:
            yield
        finally:
            stopping.set()
    for one in working:
        one.result()


def test_the_script_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(SCRIPT, "synchronous-use.md", "exec"), {})
    assert capsys.readouterr().out == "()\n"


def test_orders_are_charged(client: Client, workers: None) -> None:
    def order(number: int) -> Any:
        status, created = client.post("/orders", {"pens": number}, Idempotency_Key=f"order {number}")
        assert status == 201
        while (answer := client.get(f"/orders/{created['run']}"))[1]["status"] == "Running":
            pass  # The view answers after ten seconds at the latest.
        return answer

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(order, range(CLIENTS)))
    assert answers == [
        (200, {"status": "Succeeded", "steps": {"charge": json.dumps({"pens": number})}})
        for number in range(CLIENTS)
    ]


def test_a_repeated_request_starts_one_run(application: SimpleNamespace, client: Client) -> None:
    with ThreadPoolExecutor(CLIENTS) as clients:
        posting = [clients.submit(client.post, "/orders", {}, Idempotency_Key="once") for _ in range(CLIENTS)]
        answers = [one.result() for one in posting]
    assert sorted(status for status, _ in answers) == [200] * (CLIENTS - 1) + [201]
    (run,) = application.store.get_runs()
    assert {answer["run"] for _, answer in answers} == {str(run.run_id)}


def test_an_unknown_order_is_not_found(client: Client) -> None:
    status, _ = client.get(f"/orders/{uuid4()}")
    assert status == 404
