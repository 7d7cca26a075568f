"""The TLS options of the driver, in the URL and as keywords, against a server that requires TLS."""

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
from tests.security.leaks import ENCODED, PASSWORD_PARTS, detect_leaks_in_loop
from tests.security.tls_cluster import TlsCluster, find_server

# One worker and one server for all of these tests.
pytestmark = pytest.mark.xdist_group("tls")


@dataclass(frozen=True)
class TlsServer:
    port: int
    version: int
    folder: Path

    def url(self, host: str = "localhost", user: str = f"me:{ENCODED}", **query: str) -> str:
        options = {"schema": "of_tls", "retry_timeout": "0.2", **query}
        return f"postgresql://{user}@{host}:{self.port}/postgres?{urlencode(options)}"

    def file(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    if find_server() is None:
        pytest.skip("no PostgreSQL with TLS is installed")
    folder = tmp_path_factory.mktemp("tls")
    root, other_root = trustme.CA(), trustme.CA()
    # The certificate does not cover the address 127.0.0.1.
    server = root.issue_cert("localhost")
    server.private_key_pem.write_to_path(str(folder / "server.key"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "server.pem"), append=True)
    root.cert_pem.write_to_path(str(folder / "root.pem"))
    other_root.cert_pem.write_to_path(str(folder / "other.pem"))
    for name, authority in (("client", root), ("stranger", other_root)):
        issued = authority.issue_cert("certified@example.org", common_name="certified")
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        (folder / f"{name}.key").chmod(0o600)
    (folder / "rubbish.pem").write_text("no certificate\n")
    cluster = TlsCluster(folder)
    yield TlsServer(cluster.port, cluster.version, folder)
    cluster.stop()


async def _tls_version(url: str, **options: Any) -> str | None:
    """Return the TLS version of the store's connections, or None if they do not use TLS."""
    async with open_store(url, **options) as validated:
        await validated.ping()
    _, backend, config = resolve_store(url, **options)
    async with backend.open(config) as store:
        row = await store._database.read_row("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return cast(str | None, row["version"])


async def _uses_tls(url: str, **options: Any) -> bool:
    return await _tls_version(url, **options) is not None


@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
async def test_the_right_root_certificate_is_accepted(mode: str, tls_server: TlsServer) -> None:
    root = tls_server.file("root.pem")
    assert await _uses_tls(tls_server.url(sslmode=mode, sslrootcert=root))
    assert await _uses_tls(tls_server.url(), sslmode=mode, sslrootcert=root)
    # A keyword overrides the URL.
    assert await _uses_tls(
        tls_server.url(sslmode="disable", sslrootcert=tls_server.file("other.pem")),
        sslmode=mode,
        sslrootcert=root,
    )


async def test_verify_ca_ignores_the_host_name(tls_server: TlsServer) -> None:
    root = tls_server.file("root.pem")
    assert await _uses_tls(tls_server.url("127.0.0.1", sslmode="verify-ca", sslrootcert=root))


async def test_the_negotiation_reaches_the_driver(tls_server: TlsServer) -> None:
    options = {"sslmode": "verify-full", "sslrootcert": tls_server.file("root.pem")}
    assert await _uses_tls(tls_server.url(sslnegotiation="postgres", **options))
    direct = tls_server.url(sslnegotiation="direct", **options)
    if tls_server.version >= 17:
        assert await _uses_tls(direct)
    else:
        # The failure on older servers, which lack direct negotiation, shows that the driver requested it.
        with pytest.raises(StoreUnavailableError):
            await _uses_tls(direct)


@pytest.mark.parametrize(
    ("option", "version"), [("ssl_max_protocol_version", "TLSv1.2"), ("ssl_min_protocol_version", "TLSv1.3")]
)
async def test_version_limits_reach_the_driver(option: str, version: str, tls_server: TlsServer) -> None:
    assert await _tls_version(tls_server.url(sslmode="require", **{option: version})) == version


async def test_a_client_certificate_authenticates(tls_server: TlsServer) -> None:
    options = {
        "sslmode": "verify-full",
        "sslrootcert": tls_server.file("root.pem"),
        "sslcert": tls_server.file("client.pem"),
        "sslkey": tls_server.file("client.key"),
        "schema": "of_certified",
    }
    assert await _uses_tls(tls_server.url(user="certified", **options))
    for name in ("sslcert", "sslkey"):
        untrusted = {**options, name: options[name].replace("client", "stranger")}
        with pytest.raises(FlowStoreError):
            await _uses_tls(tls_server.url(user="certified", **untrusted))


@pytest.mark.parametrize(
    ("host", "options", "error", "message"),
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
async def test_an_invalid_option_is_refused_with_a_clear_error(
    host: str, options: dict[str, str], error: type[FlowStoreError], message: str, tls_server: TlsServer
) -> None:
    options = {k: tls_server.file(v) if v.endswith(".pem") else v for k, v in options.items()}
    for in_url in (True, False):
        url = tls_server.url(host, **(options if in_url else {}))
        keywords: dict[str, Any] = {} if in_url else dict(options)
        async with detect_leaks_in_loop() as detector:
            with pytest.raises(error, match=message) as caught:
                async with open_store(url, **keywords):
                    pytest.fail("open_store succeeded")
            detector.record_error(caught.value, "open_store")
        assert not detector.find(*PASSWORD_PARTS)


async def test_an_untrusted_certificate_fails_without_retries(tls_server: TlsServer) -> None:
    url = tls_server.url(sslmode="verify-full", sslrootcert=tls_server.file("other.pem"), retry_timeout="60")
    with pytest.raises(ConfigurationError):
        async with asyncio.timeout(50), open_store(url):
            pytest.fail("open_store succeeded")


async def test_a_server_without_tls_is_refused_if_tls_is_required() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A PostgreSQL server without TLS answers the TLS request with N.
        await reader.read(8)
        writer.write(b"N")
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        with pytest.raises(StoreUnavailableError, match="offers no TLS"):
            async with open_store(f"postgresql://me@127.0.0.1:{port}/x?sslmode=require&retry_timeout=0.1"):
                pytest.fail("open_store succeeded")
    finally:
        listener.close()
