"""What ``flowstore ping`` and ``flowstore doctor`` say about a cluster, and the deletion of a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flowstore_core import StoreConfig
from flowstore_core.backend import Diagnostic, Severity
from flowstore_documents import clear_keys, delete_all_keys
from flowstore_etcd.connection import Connection
from flowstore_etcd.etcd_pb2 import StatusResponse
from flowstore_etcd.settings import read_settings
from flowstore_etcd.space import EtcdSpace

DEFAULT_QUOTA = 2 * 2**30
"""The quota of a member that does not tell its own (etcd before 3.6)."""
FULL_SHARE = 0.8

Statuses = Mapping[str, StatusResponse | str]


async def describe(config: StoreConfig) -> Mapping[str, str]:
    """The versions of the members and the size of the database."""
    statuses = await _statuses(config)
    known = {address: status for address, status in statuses.items() if isinstance(status, StatusResponse)}
    versions = [f"{address} etcd {status.version}" for address, status in known.items()]
    silent = [f"{address} does not answer" for address in statuses if address not in known]
    found = {"members": ", ".join(versions + silent)}
    if known:
        largest = max(known.values(), key=lambda status: status.db_size)
        found["database"] = f"{_size(largest)}, {largest.db_size_in_use / 2**20:,.0f} MiB in use"
    return found


async def diagnose(config: StoreConfig) -> Sequence[Diagnostic]:
    return [*check_members(await _statuses(config))]


def check_members(statuses: Statuses) -> Iterator[Diagnostic]:
    for address, status in statuses.items():
        if isinstance(status, StatusResponse):
            yield from _check_member(address, status)
            continue
        yield Diagnostic(
            code="member-unreachable",
            severity=Severity.WARNING,
            summary=f"member {address} does not answer",
            meaning=f"The store uses the other members of the URL, if there are any. gRPC says: {status}",
            remedy="check the member, its address, firewalls, and the options tls, cacert, cert and key",
        )
    if len(statuses) == 1:
        yield Diagnostic(
            code="one-member",
            severity=Severity.NOTE,
            summary="the URL names one member",
            meaning="When this member cannot be reached, no call succeeds, even if the cluster has others.",
            remedy="name all members: etcd://host1:2379,host2:2379,host3:2379/prefix",
        )


def _check_member(address: str, status: StatusResponse) -> Iterator[Diagnostic]:
    if not status.leader:
        yield Diagnostic(
            code="no-leader",
            severity=Severity.ERROR,
            summary=f"member {address} has no leader",
            meaning="It cannot reach a majority of the members, so no call succeeds there.",
            remedy="start the other members, or repair the network between them",
        )
    if any("NOSPACE" in error for error in status.errors):
        yield Diagnostic(
            code="no-space",
            severity=Severity.ERROR,
            summary=f"the database of member {address} is full ({_size(status)})",
            meaning="Every write fails until the alarm is disarmed.",
            remedy="etcdctl compact and defrag, then etcdctl alarm disarm; or raise --quota-backend-bytes",
        )
    elif status.db_size > FULL_SHARE * (status.db_size_quota or DEFAULT_QUOTA):
        yield Diagnostic(
            code="nearly-full",
            severity=Severity.WARNING if status.db_size_quota else Severity.NOTE,
            summary=f"the database of member {address} is large ({_size(status)})",
            meaning="Once it reaches the quota of the server every write fails. By default that is 2 GiB.",
            remedy="flowstore cleanup, etcd's --auto-compaction-retention, or a higher --quota-backend-bytes",
        )
    if any("CORRUPT" in error for error in status.errors):
        yield Diagnostic(
            code="corrupt",
            severity=Severity.ERROR,
            summary=f"member {address} has found that the data of the members differ",
            meaning="etcd refuses all requests.",
            remedy="restore a backup, as etcd's documentation of disaster recovery explains",
        )
    major, minor = (int(part) for part in status.version.split(".")[:2])
    if (major, minor) < (3, 5):
        yield Diagnostic(
            code="old-etcd",
            severity=Severity.NOTE,
            summary=f"member {address} is etcd {status.version}",
            meaning="Before 3.5 etcd gets slow after large deletions, until it is restarted.",
            remedy="etcd 3.5 or newer",
        )


def _size(status: StatusResponse) -> str:
    quota = f" of {status.db_size_quota / 2**20:,.0f}" if status.db_size_quota else ""
    return f"{status.db_size / 2**20:,.0f}{quota} MiB"


async def _statuses(config: StoreConfig) -> Statuses:
    connection = Connection(read_settings(config))
    try:
        return await connection.statuses()
    finally:
        await connection.aclose()


async def delete_all(url: str, *, clears: bool = False) -> None:
    """Delete every key of a store; with ``clears``, only those that open stores do not need."""
    space = EtcdSpace(read_settings(StoreConfig.from_url(url)))
    try:
        await (clear_keys if clears else delete_all_keys)(space)
    finally:
        await space.aclose()
