"""A PostgreSQL server that accepts only TLS connections over TCP and requires authentication.

The wheel used by the other tests is built without TLS, so this module starts a server installed by the
system. Run as a program with a folder that holds ``server.pem``, ``server.key`` and ``root.pem``, it prints
its port and version on one line of stdout and stops when stdin is closed.
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
    """Return the folder with the programs of the newest installed PostgreSQL that was built with TLS."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if found := shutil.which("pg_config"):
        folders.append(Path(found).parent)
    for folder in sorted(
        folders, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], reverse=True
    ):
        config = folder / "pg_config"
        if (folder / "initdb").exists() and config.exists():
            built = subprocess.run(
                [config, "--configure"], capture_output=True, text=True, check=False
            ).stdout
            if "openssl" in built:
                return folder
    return None


class TlsCluster:
    """Controls the process that starts and stops the server."""

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


def main(certificates: Path) -> None:
    programs = find_server()
    assert programs is not None
    with tempfile.TemporaryDirectory(prefix="flowstore-tls-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        if owner is not None:
            # PostgreSQL refuses to run as root.
            os.chown(folder, owner.pw_uid, owner.pw_gid)

        def run(program: str, arguments: Sequence[str], text: str | None = None) -> str:
            with tempfile.TemporaryFile("w+") as output:
                subprocess.run(
                    [programs / program, *arguments],
                    user=None if owner is None else owner.pw_uid,
                    group=None if owner is None else owner.pw_gid,
                    input=text,
                    text=True,
                    check=True,
                    cwd=folder,
                    stdout=output,
                )
                output.seek(0)
                return output.read()

        run("initdb", ["-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"])
        for name in ("server.pem", "server.key", "root.pem"):
            shutil.copy(certificates / name, data / name)
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
