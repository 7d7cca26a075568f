"""``flowstore dashboard`` and ``flowstore runs show --html`` as processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from flowstore_cli.main import main
from flowstore_core import open_store
from tests.dashboard.client import Client
from tests.dashboard.examples import Examples, clock_before_now, write_examples

FLOWSTORE = (sys.executable, "-m", "flowstore_cli.main")


@pytest.fixture
async def stored(tmp_path: Path) -> tuple[str, Examples]:
    """The URL of a SQLite store, and the ids of its runs."""
    url = f"sqlite:///{tmp_path}/flows.db"
    clock = clock_before_now(minutes=30)
    async with open_store(url, clock=clock) as store:
        return url, await write_examples(store, clock)


@contextmanager
def running(url: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process, and the address that it prints."""
    command = [*FLOWSTORE, "dashboard", "--url", url, "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/) \(Ctrl-C stops it\)\n", line)
        if match is None:
            process.kill()
            pytest.fail(f"{line!r}: {process.communicate()[1]}")
        yield process, match[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_serves_until_it_is_told_to_stop(
    stored: tuple[str, Examples], number: signal.Signals
) -> None:
    url, examples = stored
    with running(url) as (process, address):
        answer = await Client(address).get(f"/runs/{examples.taken_over}")
        assert "never reported a result" in answer.text
        host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
        # A browser that follows a page does not keep the server from stopping.
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /live/runs/{examples.running} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await reader.readuntil(b"data: ")
        process.send_signal(number)
        out, err = await asyncio.to_thread(process.communicate, timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
        writer.close()


async def test_a_login_with_the_token_of_the_environment(
    stored: tuple[str, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWSTORE_DASHBOARD_TOKEN", "sixteen-or-more-characters")
    with running(stored[0]) as (_, address):
        client = Client(address)
        assert (await client.get("/runs")).headers["location"] == "/login"
        form = await client.get("/login")
        fields = {"csrf": form.csrf, "token": "sixteen-or-more-characters"}
        entered = await client.post("/login", fields, cookie=form.cookie or "")
        assert (await client.get("/runs", cookie=entered.cookie or "")).status == 200


def test_an_address_in_use_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["dashboard", "--url", "memory://", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flowstore: cannot listen on 127.0.0.1 port {port}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("starlette", ["dashboard", "--url", "memory://"]),
        ("uvicorn", ["dashboard", "--url", "memory://"]),
        ("jinja2", ["runs", "show", str(UUID(int=1)), "--html", "x.html", "--url", "memory://"]),
    ],
)
def test_the_missing_extra_is_named(module: str, arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from flowstore_cli.main import main; "
        f"sys.exit(main({arguments!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"flowstore: module '{module}' is missing; pip install 'flowstore[dashboard]'\n"


def test_other_commands_do_not_import_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; from flowstore_cli.main import main; main(['backends']); "
        "print(sorted({'starlette', 'uvicorn', 'jinja2'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("[]\n")


async def test_the_page_of_a_run_is_written_to_a_file(
    stored: tuple[str, Examples], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, examples = stored
    file = tmp_path / "run.html"
    show = ["runs", "show", examples.taken_over.hex[-8:], "--url", url, "--html"]

    async def run(*arguments: str) -> int:
        done = await asyncio.to_thread(subprocess.run, [*FLOWSTORE, *arguments], check=False)
        return done.returncode

    assert await run(*show, str(file)) == 0
    text = file.read_text(encoding="utf-8")
    assert "never reported a result" in text
    assert "<script" not in text
    assert f"from {url} " in text
    assert file.stat().st_mode & 0o777 == 0o600
    assert await run(*show, str(tmp_path / "missing" / "run.html")) == 4
    assert await run(*show, str(file), "--json") == 2
