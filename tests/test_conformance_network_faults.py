"""``--faults``: the proxies, the URLs that they serve, and what the checks behind them find."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flowstore_conformance import disturbers, run_suite
from flowstore_conformance.context import Profile
from flowstore_conformance.guard import OPTIONAL_PROTOCOLS, GuardedBackend, RecyclingBackend
from flowstore_conformance.network_faults import (
    BackendWithNetworkFaults,
    NetworkInjector,
    disturbed_network,
    read_addresses,
)
from flowstore_conformance.proxy import LOOPBACK, FaultyNetwork, NetworkFault
from flowstore_conformance.registry import Check
from flowstore_conformance.rendering import render_json, render_text
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core import Backend, ConfigurationError, open_store
from flowstore_core import backend as sdk
from flowstore_core.backend import FaultInjectable
from flowstore_core.plugins import find_backend
from flowstore_core.urls import parse_url
from tests.documents_backend import DIST as DOCUMENTS
from tests.network_backend import DIST as NETWORK
from tests.network_backend.server import serve

CHECKS = {one.name: one for one in select_checks(faults=True)}
PROGRAMS = CHECKS["every_write_survives_a_disturbed_network"]
BY_INJECTOR = CHECKS["every_write_survives_faults_of_the_injector"]
CANCELLED = CHECKS["cancelled_claims_are_released_after_faults"]


# The proxy


class Peer:
    """A server that records what it gets and answers each line with ``ok``, line by line."""

    def __init__(self) -> None:
        self.received = b""
        self.changed = asyncio.Event()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            while data := await stream.read(1000):
                self.received += data
                self.changed.set()
                if data.endswith(b"\n"):
                    writer.write(b"ok\n")
        except ConnectionError:
            pass
        writer.close()

    async def aclose(self) -> None:
        for writer in self._connections.values():
            writer.close()
        await asyncio.gather(*self._connections)

    async def has_received(self, data: bytes) -> None:
        while self.received != data:
            self.changed.clear()
            await self.changed.wait()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Peer, FaultyNetwork]]:
    peer = Peer()
    server = await asyncio.start_server(peer.serve, LOOPBACK, 0)
    network = FaultyNetwork([(LOOPBACK, server.sockets[0].getsockname()[1])])
    await network.start()
    try:
        async with asyncio.timeout(30):
            yield peer, network
    finally:
        await network.aclose()
        server.close()
        await peer.aclose()


class Client:
    """One connection through a proxy."""

    def __init__(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.stream = stream
        self.writer = writer

    async def ask(self, line: bytes) -> bytes:
        """The reply; empty or a part of it if the connection ends."""
        self.writer.write(line)
        reply = b""
        while not reply.endswith(b"\n") and (data := await self.stream.read(1000)):
            reply += data
        return reply


@asynccontextmanager
async def connected(network: FaultyNetwork) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection(LOOPBACK, network.ports[0]))
    try:
        yield client
    finally:
        client.writer.close()


async def test_a_proxy_without_a_fault_relays_everything() -> None:
    async with proxied() as (peer, network), connected(network) as client:
        text = b"x" * 300_000 + b"\n"
        assert await client.ask(text) == b"ok\n"
        assert peer.received == text
        assert not network.disarm()
        assert network.connections == 1


async def test_a_lost_reply_reaches_the_server_and_not_the_client() -> None:
    async with proxied() as (peer, network), connected(network) as client:
        network.arm(NetworkFault.LOSE_REPLY, skip=1)
        assert await client.ask(b"first\n") == b"ok\n"
        with pytest.raises(ConnectionError):
            await client.ask(b"second\n")
        assert peer.received == b"first\nsecond\n"
        assert network.disarm()
        [injection] = network.injections
        assert (injection.fault, injection.request) == (NetworkFault.LOSE_REPLY, 2)


async def test_a_reply_that_never_comes_is_lost_too() -> None:
    async with proxied() as (peer, network), connected(network) as client:
        network.arm(NetworkFault.LOSE_REPLY)
        with pytest.raises(ConnectionError):
            await client.ask(b"no end of the line")
        assert peer.received == b"no end of the line"


async def test_a_lost_request_does_not_reach_the_server() -> None:
    async with proxied() as (peer, network):
        network.arm(NetworkFault.LOSE_REQUEST)
        async with connected(network) as client:
            with pytest.raises(ConnectionError):
                await client.ask(b"first\n")
        async with connected(network) as client:
            assert await client.ask(b"second\n") == b"ok\n"
        assert peer.received == b"second\n"


async def test_a_reply_is_cut_after_some_bytes() -> None:
    async with proxied() as (peer, network), connected(network) as client:
        network.arm(NetworkFault.CUT_REPLY, at_byte=2)
        assert await client.ask(b"first\n") == b"ok"
        assert peer.received == b"first\n"


async def test_a_request_is_cut_after_some_bytes() -> None:
    async with proxied() as (peer, network), connected(network) as client:
        network.arm(NetworkFault.CUT_REQUEST, at_byte=3)
        with pytest.raises(ConnectionError):
            await client.ask(b"first\n")
        await peer.has_received(b"fir")


async def test_a_held_request_arrives_when_it_is_released() -> None:
    async with proxied() as (peer, network):
        network.arm(NetworkFault.HOLD_REQUEST)
        async with connected(network) as client:
            with pytest.raises(ConnectionError):
                await client.ask(b"late\n")
        async with connected(network) as client:
            assert await client.ask(b"early\n") == b"ok\n"
        await network.release()
        assert peer.received == b"early\nlate\n"


async def test_a_reset_ends_both_sides() -> None:
    async with proxied() as (_, network), connected(network) as client:
        network.arm(NetworkFault.RESET)
        with pytest.raises(ConnectionError):
            await client.ask(b"first\n")


async def test_a_black_hole_is_silent_until_it_ends() -> None:
    async with proxied() as (peer, network), connected(network) as first, connected(network) as second:
        assert await second.ask(b"before\n") == b"ok\n"
        network.arm(NetworkFault.BLACK_HOLE)
        asking = [asyncio.ensure_future(one.ask(b"during\n")) for one in (first, second)]
        async with connected(network) as third:
            asking.append(asyncio.ensure_future(third.ask(b"during\n")))
            await asyncio.wait(asking, timeout=0.1)
            assert not any(one.done() for one in asking)
            network.heal()
            ends = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(end, ConnectionError) for end in ends)
        async with connected(network) as fourth:
            assert await fourth.ask(b"after\n") == b"ok\n"
        assert peer.received == b"before\nafter\n"


async def test_nothing_passes_an_isolating_fault_until_it_is_disarmed() -> None:
    async with proxied() as (peer, network), connected(network) as first, connected(network) as second:
        network.arm(NetworkFault.LOSE_REPLY, isolates=True)
        with pytest.raises(ConnectionError):
            await first.ask(b"first\n")
        asking = asyncio.ensure_future(second.ask(b"second\n"))
        await asyncio.wait({asking}, timeout=0.1)
        assert not asking.done()
        assert peer.received == b"first\n"
        assert network.disarm()
        assert await asking == b"ok\n"


# URLs


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("kv://u:p@one:1,two:2/space?a=b", [("one", 1), ("two", 2)]),
        ("kv://[::1]:99/", [("::1", 99)]),
        ("kv://localhost:5432", [("localhost", 5432)]),
    ],
)
def test_every_host_of_a_url_is_read(url: str, addresses: list[tuple[str, int]]) -> None:
    assert read_addresses(parse_url(url)) == addresses


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:///flows.db", "names no host:port"),
        ("postgresql:///db?host=/tmp", "names no host:port"),
        ("kv://one:1,two/space", "Write the port"),
    ],
)
def test_a_url_without_hosts_and_ports_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        read_addresses(parse_url(url))


async def test_each_server_of_a_url_is_behind_its_own_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NETWORK)
    async with serve() as one, serve() as other:
        url = f"network://me:s%2Fcret@localhost:{one},{LOOPBACK}:{other}/space%20one?retry_timeout=2"
        async with disturbed_network(url) as (network, through):
            ports = network.ports
            assert through == (
                f"network://me:s%2Fcret@localhost:{ports[0]},{LOOPBACK}:{ports[1]}/space%20one?retry_timeout=2"
            )
            assert len({one, other, *ports}) == 4
            async with open_store(through) as store:
                before = network.connections
                await store.ping()
                assert network.connections > before


async def test_a_store_that_cannot_be_opened_through_a_proxy_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(NETWORK)
    async with serve() as port:
        pass
    with pytest.raises(ConfigurationError, match=r"cannot be opened through a proxy.*TLS.*FaultInjectable"):
        async with disturbed_network(f"network://{LOOPBACK}:{port}/flows?retry_timeout=0.1"):
            pass


async def test_a_store_that_goes_past_the_proxy_says_what_to_do(fresh: str) -> None:
    # The option host overrides the host in front.
    url = parse_url(fresh).with_hosts(f"{LOOPBACK}:5432")
    with pytest.raises(ConfigurationError, match=r"did not connect.*host="):
        async with disturbed_network(url):
            pass


# Wrapped backends


def test_wrappers_have_the_optional_members_of_a_backend() -> None:
    plain = find_backend("postgresql")[1]
    faulty = BackendWithNetworkFaults(plain)
    guarded = GuardedBackend(faulty, "postgresql://")
    for wrapper in (faulty, guarded, RecyclingBackend(guarded)):
        # As isinstance() with a protocol does from Python 3.12 on.
        assert inspect.getattr_static(wrapper, "inject_faults")
        assert inspect.getattr_static(wrapper, "variants")
        assert isinstance(wrapper, FaultInjectable)
    assert not isinstance(GuardedBackend(find_backend("memory")[1], "memory://"), FaultInjectable)


def test_wrappers_know_every_optional_protocol() -> None:
    optional = {one for one in vars(sdk).values() if getattr(one, "_is_runtime_protocol", False)}
    # A wrapper always has limits and max_skew: those of the opened store.
    assert set(OPTIONAL_PROTOCOLS) == optional - {Backend, sdk.Limited, sdk.SharedClock}


async def test_a_backend_without_an_injector_gets_the_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NETWORK)
    backend = BackendWithNetworkFaults(find_backend("network")[1])
    async with serve() as port, backend.inject_faults(f"network://{LOOPBACK}:{port}/flows") as injector:
        assert isinstance(injector, NetworkInjector)
        with pytest.raises(ConfigurationError, match="cannot refuse a request"):
            injector.refuse_request()


# The checks


async def run_on(scheme: str, check: Check, *, seed: int, options: str = "") -> CheckResult:
    backend = BackendWithNetworkFaults(find_backend(scheme)[1])
    async with serve() as port:
        url = f"{scheme}://{LOOPBACK}:{port}/flows{options}"
        return await run_check(check, url, backend, Profile.QUICK, seed)


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NETWORK)
    monkeypatch.syspath_prepend(DOCUMENTS)


@pytest.mark.parametrize("options", ["", "?retry_timeout=0.15"], ids=["patient", "impatient"])
@pytest.mark.parametrize("check", [PROGRAMS, CANCELLED], ids=lambda check: check.name)
async def test_a_correct_backend_passes(check: Check, options: str) -> None:
    result = await run_on("network", check, seed=11, options=options)
    assert result.status is Status.PASS, result


@pytest.mark.parametrize(
    "name",
    [
        "a_lost_reply_is_resolved",
        "a_late_request_changes_nothing",
        "a_write_whose_effect_was_reversed_is_not_repeated",
        "a_repeated_claim_claims_nothing_more",
    ],
)
async def test_the_proxies_serve_the_checks_of_single_faults(name: str) -> None:
    result = await run_on("network", CHECKS[name], seed=11)
    assert result.status is Status.PASS, result


@pytest.mark.parametrize(
    ("scheme", "clauses"),
    [
        ("network-resends", {"CON-3"}),
        ("network-late", {"CON-3"}),
        # Beside a stale answer, the result of a write may look wrong.
        ("network-stale", {"CON-1", "CON-3"}),
        ("network-leaks", {"CON-2"}),
    ],
)
async def test_a_mutant_is_found(scheme: str, clauses: set[str]) -> None:
    # The moments of the faults differ from run to run, and a slow machine makes fewer races in its time.
    found = []
    for seed in range(10):
        result = await run_on(scheme, PROGRAMS, seed=seed)
        if result.failure is not None:
            found.append(result.failure)
            if result.failure.clause in clauses:
                break
    assert found
    assert found[-1].clause in clauses, found
    assert "Fault" in found[-1].message or "fault" in found[-1].message


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("network-resends", "a_lost_reply_is_resolved"),
        ("network-late", "a_late_request_changes_nothing"),
    ],
)
async def test_a_mutant_is_found_by_a_single_fault(
    scheme: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wrong result is permanent.
    monkeypatch.setattr("flowstore_conformance.state_probe.SETTLE_SECONDS", 0.5)
    result = await run_on(scheme, CHECKS[name], seed=1)
    assert result.failure is not None
    assert result.failure.clause == "CON-3"


async def test_a_backend_with_its_own_injector_is_disturbed_by_it() -> None:
    backend = BackendWithNetworkFaults(find_backend("documents")[1])
    result = await run_check(BY_INJECTOR, "documents://", backend, Profile.QUICK, 7)
    assert result.status is Status.PASS, result


@asynccontextmanager
async def postgresql_over_tcp(url: str) -> AsyncIterator[str]:
    """The URL of the server of the tests, which listens on a Unix socket, by host and port."""
    socket = f"{parse_url(url).options['host']}/.s.PGSQL.5432"
    relays: dict[asyncio.Task[None] | None, tuple[asyncio.StreamWriter, ...]] = {}

    async def relay(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_stream, server_writer = await asyncio.open_unix_connection(socket)
        relays[asyncio.current_task()] = writer, server_writer
        await asyncio.gather(_pass_on(stream, server_writer), _pass_on(server_stream, writer))

    server = await asyncio.start_server(relay, LOOPBACK, 0)
    try:
        yield f"postgresql://postgres@{LOOPBACK}:{server.sockets[0].getsockname()[1]}/postgres?sslmode=disable"
    finally:
        server.close()
        for writers in relays.values():
            for writer in writers:
                writer.close()
        await asyncio.gather(*(task for task in relays if task is not None))


async def _pass_on(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await stream.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.mark.parametrize("check", [PROGRAMS, BY_INJECTOR, CANCELLED], ids=lambda check: check.name)
async def test_postgresql_passes(check: Check, postgresql_url: str) -> None:
    async with postgresql_over_tcp(postgresql_url) as url:
        backend = BackendWithNetworkFaults(find_backend("postgresql")[1])
        result = await run_check(check, url, backend, Profile.QUICK, 7)
    assert result.status is Status.PASS, (result.reason, result.failure)


async def test_a_claim_that_is_not_released_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowstore_core.backend import ShieldedTasks

    original = ShieldedTasks.run

    async def run(self: ShieldedTasks, work: object, on_abandoned: object = None) -> object:
        return await original(self, work)  # type: ignore[arg-type]

    monkeypatch.setattr(ShieldedTasks, "run", run)
    monkeypatch.setattr("flowstore_conformance.checks.disturbed.COMPENSATION_SECONDS", 0.5)
    result = await run_on("network", CANCELLED, seed=1)
    assert result.failure is not None
    assert result.failure.clause == "CON-4"


async def test_a_store_that_does_not_recover_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The network stays silent after its last fault.
    monkeypatch.setattr(FaultyNetwork, "heal", lambda self: None)
    monkeypatch.setattr("flowstore_conformance.disturbed_races.RECOVERY_SECONDS", 0.5)
    monkeypatch.setattr(disturbers, "MAX_SKIPPED_REQUESTS", 3)
    monkeypatch.setattr("tests.network_backend.space.TIMEOUT", 0.2)
    result = await run_on("network", PROGRAMS, seed=1, options="?retry_timeout=0.1")
    assert result.failure is not None
    assert result.failure.clause == "CON-2"


# The suite


@pytest.mark.parametrize("scheme", ["memory", "sqlite"])
async def test_a_store_without_a_network_is_unsupported(scheme: str, tmp_path: Path) -> None:
    url = "memory://" if scheme == "memory" else f"sqlite:///{tmp_path}/flows.db"
    names = (PROGRAMS.name, BY_INJECTOR.name, CANCELLED.name)
    report = await run_suite(url, profile="quick", check_names=names, faults=True, seed=1)
    assert {one.status for one in report.results} == {Status.UNSUPPORTED}
    assert all("names no host:port" in (one.reason or "") for one in report.results)
    assert not report.conforms


async def test_checks_of_faults_run_only_on_demand() -> None:
    assert PROGRAMS not in select_checks()
    with pytest.raises(ConfigurationError, match="add --faults"):
        await run_suite("memory://", check_names=[PROGRAMS.name])


async def test_a_report_repeats_with_faults() -> None:
    async with serve() as port:
        url = f"network-leaks://{LOOPBACK}:{port}/flows"
        report = await run_suite(
            url, profile="quick", check_names=[PROGRAMS.name], faults=True, seed=5, repeats=0
        )
    [result] = report.failures
    assert f"--check {PROGRAMS.name} --seed 5 --faults" in report.command(result)
    assert "--faults" in render_text(report)
    assert "--faults" in render_json(report)
    assert "--faults" not in replace(report, faults=False).command(result)
