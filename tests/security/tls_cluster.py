"""A PostgreSQL server that speaks TLS alone on a port of its own, with passwords; for the time of some tests.

The server of the wheel that the other tests use was built without TLS, so this is one that the system has
installed. Run as a program, with a folder that holds ``server.pem``, ``server.key`` and ``root.pem``, it says
its port and its version in one line on stdout and serves until stdin ends.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ACCESS = """
local   all all trust
hostssl all certified 127.0.0.1/32 cert
hostssl all all 127.0.0.1/32 scram-sha-256
"""
SETTINGS = """
listen_addresses = '127.0.0.1'
fsync = off
password_encryption = 'scram-sha-256'
ssl = on
ssl_cert_file = 'server.pem'
ssl_key_file = 'server.key'
ssl_ca_file = 'root.pem'
"""
ROLES = """
CREATE ROLE me LOGIN PASSWORD 'caNary/p@ss?w#rd:1'; GRANT CREATE ON DATABASE postgres TO me;
CREATE ROLE certified LOGIN; GRANT CREATE ON DATABASE postgres TO certified;
"""


def find_server() -> Path | None:
    """Where the programs of an installed PostgreSQL with TLS are; the newest, if there are several."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if found := shutil.which("pg_config"):
        places.append(Path(found).parent)
    for place in sorted(
        places, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True
    ):
        config = place / "pg_config"
        if (place / "initdb").exists() and config.exists():
            built = subprocess.run(
                [config, "--configure"], capture_output=True, text=True, check=False
            ).stdout
            if "openssl" in built:
                return place
    return None


class TlsCluster:
    """The server's keeper process, seen from the tests."""

    def __init__(self, folder: Path) -> None:
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        port, version = self._keeper.stdout.readline().split()
        self.port, self.version = int(port), int(version)

    def stop(self) -> None:
        self._keeper.communicate(timeout=60)


def main(given: Path) -> None:
    place = find_server()
    assert place is not None
    with tempfile.TemporaryDirectory(prefix="flowstore-tls-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        if owner is not None:
            # PostgreSQL refuses to run as root.
            os.chown(folder, owner.pw_uid, owner.pw_gid)

        def run(program: str, arguments: Sequence[str], text: str | None = None) -> str:
            with tempfile.TemporaryFile("w+") as said:
                subprocess.run(
                    [place / program, *arguments],
                    user=None if owner is None else owner.pw_uid,
                    group=None if owner is None else owner.pw_gid,
                    input=text,
                    text=True,
                    check=True,
                    cwd=folder,
                    stdout=said,
                )
                said.seek(0)
                return said.read()

        run("initdb", ["-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"])
        for name in ("server.pem", "server.key", "root.pem"):
            shutil.copy(given / name, data / name)
            if owner is not None:
                os.chown(data / name, owner.pw_uid, owner.pw_gid)
            os.chmod(data / name, 0o600)
        (data / "pg_hba.conf").write_text(ACCESS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(f"{SETTINGS}\nport = {port}\nunix_socket_directories = '{folder}'\n")
        run("pg_ctl", ["-D", str(data), "-w", "-l", str(data / "log"), "start"])
        try:
            run(
                "psql",
                ["-h", folder, "-p", str(port), "-U", "postgres", "-q", "-v", "ON_ERROR_STOP=1"],
                ROLES,
            )
            version = (data / "PG_VERSION").read_text().strip()
            sys.stdout.write(f"{port} {version}\n")
            sys.stdout.flush()
            sys.stdin.read()
        finally:
            run("pg_ctl", ["-D", str(data), "-m", "immediate", "-w", "stop"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
