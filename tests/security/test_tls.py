"""The TLS options of the driver, in the URL and as keywords, against a server that speaks TLS alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import pytest
import trustme

from flowstore_core import ConfigurationError, FlowStoreError, StoreUnavailableError, open_store
from flowstore_core.open import resolve_store
from tests.security.tls_cluster import TlsCluster, find_server
from tests.security.watch import ENCODED, IN_PASSWORDS, watching_loop


@dataclass(frozen=True)
class Secured:
    port: int
    version: int
    folder: Path

    def url(self, host: str = "localhost", user: str = f"me:{ENCODED}", **query: str) -> str:
        options = {"schema": "of_tls", "retry_timeout": "0.2", **query}
        return f"postgresql://{user}@{host}:{self.port}/postgres?{urlencode(options)}"

    def file(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if find_server() is None:
        pytest.skip("no PostgreSQL with TLS is installed")
    folder = tmp_path_factory.mktemp("tls")
    root, other = trustme.CA(), trustme.CA()
    # Of the name alone, so that the address is a host that the certificate does not name.
    server = root.issue_cert("localhost")
    server.private_key_pem.write_to_path(str(folder / "server.key"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "server.pem"), append=True)
    root.cert_pem.write_to_path(str(folder / "root.pem"))
    other.cert_pem.write_to_path(str(folder / "other.pem"))
    for name, authority in (("client", root), ("stranger", other)):
        issued = authority.issue_cert("certified@example.org", common_name="certified")
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        (folder / f"{name}.key").chmod(0o600)
    (folder / "rubbish.pem").write_text("no certificate\n")
    cluster = TlsCluster(folder)
    yield Secured(cluster.port, cluster.version, folder)
    cluster.stop()


async def _tls(url: str, **options: Any) -> str | None:
    """The version of TLS that the store's connections speak."""
    async with open_store(url, **options) as checked:
        await checked.ping()
    _, backend, config = resolve_store(url, **options)
    async with backend.open(config) as store:
        row = await store._database.read_row("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return cast(str | None, row["version"])


async def _speaks_tls(url: str, **options: Any) -> bool:
    return await _tls(url, **options) is not None


@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
async def test_that_the_right_root_is_accepted(mode: str, secured: Secured) -> None:
    root = secured.file("root.pem")
    assert await _speaks_tls(secured.url(sslmode=mode, sslrootcert=root))
    assert await _speaks_tls(secured.url(), sslmode=mode, sslrootcert=root)
    # A keyword goes before the URL.
    assert await _speaks_tls(
        secured.url(sslmode="disable", sslrootcert=secured.file("other.pem")), sslmode=mode, sslrootcert=root
    )


async def test_that_verify_ca_ignores_the_host_name(secured: Secured) -> None:
    root = secured.file("root.pem")
    assert await _speaks_tls(secured.url("127.0.0.1", sslmode="verify-ca", sslrootcert=root))


async def test_that_the_way_of_negotiating_passes_through(secured: Secured) -> None:
    options = {"sslmode": "verify-full", "sslrootcert": secured.file("root.pem")}
    assert await _speaks_tls(secured.url(sslnegotiation="postgres", **options))
    direct = secured.url(sslnegotiation="direct", **options)
    if secured.version >= 17:
        assert await _speaks_tls(direct)
    else:
        # Older servers do not know it, which shows that it was asked for.
        with pytest.raises(StoreUnavailableError):
            await _speaks_tls(direct)


@pytest.mark.parametrize(
    ("option", "version"), [("ssl_max_protocol_version", "TLSv1.2"), ("ssl_min_protocol_version", "TLSv1.3")]
)
async def test_that_versions_pass_through(option: str, version: str, secured: Secured) -> None:
    assert await _tls(secured.url(sslmode="require", **{option: version})) == version


async def test_that_a_certificate_logs_in(secured: Secured) -> None:
    options = {
        "sslmode": "verify-full",
        "sslrootcert": secured.file("root.pem"),
        "sslcert": secured.file("client.pem"),
        "sslkey": secured.file("client.key"),
        "schema": "of_certified",
    }
    assert await _speaks_tls(secured.url(user="certified", **options))
    for name in ("sslcert", "sslkey"):
        strange = {**options, name: options[name].replace("client", "stranger")}
        with pytest.raises(FlowStoreError):
            await _speaks_tls(secured.url(user="certified", **strange))


@pytest.mark.parametrize(
    ("host", "options", "error", "says"),
    [
        (
            "localhost",
            {"sslmode": "verify-full", "sslrootcert": "other.pem"},
            ConfigurationError,
            "certificate",
        ),
        (
            "localhost",
            {"sslmode": "verify-ca", "sslrootcert": "other.pem"},
            ConfigurationError,
            "certificate",
        ),
        (
            "127.0.0.1",
            {"sslmode": "verify-full", "sslrootcert": "root.pem"},
            ConfigurationError,
            "certificate",
        ),
        (
            "localhost",
            {"sslmode": "verify-full", "sslrootcert": "absent.pem"},
            ConfigurationError,
            "sslrootcert",
        ),
        ("localhost", {"sslmode": "verify-full", "sslrootcert": "rubbish.pem"}, FlowStoreError, "TLS"),
        ("localhost", {"sslmode": "require", "sslcert": "absent.pem"}, ConfigurationError, "sslcert"),
        ("localhost", {"sslmode": "require", "sslnegotiation": "bogus"}, ConfigurationError, "direct"),
        ("localhost", {"sslmode": "disable"}, ConfigurationError, "pg_hba.conf"),
        ("localhost", {"sslmode": "require", "password": "wrong"}, ConfigurationError, "password"),
    ],
)
async def test_that_the_wrong_is_refused_with_a_clear_error(
    host: str, options: dict[str, str], error: type[FlowStoreError], says: str, secured: Secured
) -> None:
    given = {k: secured.file(v) if v.endswith(".pem") else v for k, v in options.items()}
    for in_url in (True, False):
        url = secured.url(host, **(given if in_url else {}))
        keywords: dict[str, Any] = {} if in_url else dict(given)
        async with watching_loop() as watch:
            with pytest.raises(error, match=says) as caught:
                async with open_store(url, **keywords):
                    pytest.fail("it opened")
            watch.catch(caught.value, "open_store")
        assert not watch.found(*IN_PASSWORDS)


async def test_that_a_wrong_certificate_is_reported_at_once(secured: Secured) -> None:
    url = secured.url(sslmode="verify-full", sslrootcert=secured.file("other.pem"), retry_timeout="60")
    with pytest.raises(ConfigurationError):
        async with asyncio.timeout(20), open_store(url):
            pytest.fail("it opened")


async def test_that_a_server_without_tls_is_refused_where_tls_is_asked_for() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # What every PostgreSQL that speaks no TLS answers to the request for it.
        await reader.read(8)
        writer.write(b"N")
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        with pytest.raises(StoreUnavailableError, match="offers no TLS"):
            async with open_store(f"postgresql://me@127.0.0.1:{port}/x?sslmode=require&retry_timeout=0.1"):
                pytest.fail("it opened")
    finally:
        listener.close()
