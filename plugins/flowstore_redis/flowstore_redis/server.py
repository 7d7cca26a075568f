"""What a server says about itself, and whether a store can rely on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flowstore_core.backend import Diagnostic, Severity

OLDEST = 7
SECTIONS = ("server", "replication", "memory", "persistence", "cluster")
"""Of INFO."""
SETTINGS = ("appendfsync", "no-appendfsync-on-rewrite", "replica-read-only", "save")
"""Of CONFIG GET."""
FULL_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The settings of one server."""

    info: Mapping[str, str]
    """Of the command INFO."""
    config: Mapping[str, str] | None
    """Of CONFIG GET; None if the server refuses that command."""

    @property
    def version(self) -> str:
        if "valkey_version" in self.info:
            return "Valkey " + self.info["valkey_version"]
        return "Redis " + self.info.get("redis_version", "of an unknown version")

    @property
    def problem(self) -> str | None:
        """Why no store can be on this server, with the remedy; None if one can."""
        if self.info.get("redis_mode") == "sentinel":
            return "the server is a Sentinel: give the address of the primary"
        if self.info.get("cluster_enabled") == "1":
            return (
                "the server is in cluster mode, which flowstore-redis does not support: use a single server"
            )
        # Valkey also states the version of Redis that it is compatible with.
        major = self.info.get("redis_version", "").partition(".")[0]
        if not major.isdecimal() or int(major) < OLDEST:
            return f"the server is {self.version}: flowstore-redis needs Redis 7.0 or newer, or Valkey"
        policy = self.info.get("maxmemory_policy", "not known")
        if policy != "noeviction":
            return f"maxmemory-policy is {policy}, which can delete work at any time: set it to noeviction"
        if self.config is not None and self.config.get("replica-read-only") == "no":
            return "replica-read-only is no: after a fail-over the server would lose writes; set it to yes"
        return None

    @property
    def is_replica(self) -> bool:
        return self.info.get("role") != "master"

    @property
    def replicas(self) -> int:
        return int(self.info.get("connected_slaves", 0))

    @property
    def log_begins(self) -> bool:
        """Whether the append-only file may be useless until its first rewrite ends.

        A server to which ``CONFIG SET appendonly yes`` was sent reads it only then. INFO does not tell that
        state: the same is true of a log that the server began at its start, during its first rewrite.
        """
        is_rewritten = "1" in (
            self.info.get("aof_rewrite_in_progress"),
            self.info.get("aof_rewrite_scheduled"),
        )
        return is_rewritten and self.info.get("aof_base_size") == "0"

    @property
    def is_durable(self) -> bool:
        """Whether every write is synced to the disk of this server before it is acknowledged."""
        return (
            self.info.get("aof_enabled") == "1"
            and not self.log_begins
            and self.config is not None
            and self.config.get("appendfsync") == "always"
            and self.config.get("no-appendfsync-on-rewrite") == "no"
        )

    @property
    def durability(self) -> str:
        """What a crash of the server can lose, in a few words."""
        if self.info.get("aof_enabled") != "1":
            saves = self.config is None or self.config.get("save")
            return (
                "not durable: without appendonly a crash loses all writes since the last snapshot"
                if saves
                else "not durable: without appendonly and snapshots a restart loses everything"
            )
        if self.log_begins:
            return "not durable yet: a crash loses all writes until the first rewrite of the log ends"
        if self.config is None:
            return "not known to be durable: the server does not tell appendfsync (CONFIG GET is refused)"
        sync = self.config.get("appendfsync")
        if sync == "always" and not self.is_durable:
            return "not durable: no-appendfsync-on-rewrite suspends syncing while the log is rewritten"
        if sync == "always":
            return "durable: every write is synced before it is acknowledged (appendfsync always)"
        seconds = "2 seconds of" if sync == "everysec" else "all"
        until = "" if sync == "everysec" else " that the system has not yet synced"
        return f"not durable: with appendfsync {sync} a power cut loses up to {seconds} writes{until}"

    @property
    def memory(self) -> str:
        used, limit = (int(self.info.get(name, 0)) for name in ("used_memory", "maxmemory"))
        return f"{used / 2**20:,.0f} MiB used" + (f" of {limit / 2**20:,.0f}" if limit else ", no maxmemory")


def check_server(facts: ServerFacts) -> Iterator[Diagnostic]:
    """The problems of a server, for ``flowstore doctor``."""
    if facts.problem is not None or facts.is_replica:
        yield Diagnostic(
            code="unusable-server",
            severity=Severity.ERROR,
            summary=facts.problem or "the server is a replica",
            meaning="Stores refuse this server: every call fails.",
            remedy="change the setting, or the host and port of the URL",
        )
    if not facts.is_durable:
        yield Diagnostic(
            code="not-durable",
            severity=Severity.WARNING,
            summary=facts.durability,
            meaning="Engines may do work twice, or never finish it, after acknowledged writes are lost.",
            remedy="CONFIG SET appendonly yes appendfsync always no-appendfsync-on-rewrite no, then "
            "CONFIG REWRITE; then open the stores again",
        )
    if facts.replicas:
        yield Diagnostic(
            code="asynchronous-replicas",
            severity=Severity.NOTE,
            summary="a fail-over to a replica loses acknowledged writes",
            meaning="Redis replicates after it has acknowledged. A restart of this server loses nothing.",
            remedy="restart the server rather than fail over; stop all workers before a planned fail-over",
            count=facts.replicas,
        )
    if facts.info.get("aof_last_write_status", "ok") != "ok":
        yield Diagnostic(
            code="log-not-written",
            severity=Severity.ERROR,
            summary="the last write to the append-only file failed",
            meaning="Redis refuses all writes until it succeeds.",
            remedy="make room on the disk of the server; its log has the error",
        )
    used, limit = (int(facts.info.get(name, 0)) for name in ("used_memory", "maxmemory"))
    if limit and used > FULL_SHARE * limit:
        yield Diagnostic(
            code="nearly-full",
            severity=Severity.WARNING,
            summary=f"the memory of the server is nearly full ({facts.memory})",
            meaning="Once maxmemory is reached every write fails, also that of cleanup.",
            remedy="flowstore cleanup, or a higher maxmemory",
        )
