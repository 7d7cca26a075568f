"""Watching: wait until a step is ready or a run has ended (WAT).

Hints travel by LISTEN and NOTIFY. A NOTIFY inside a writing transaction would make all commits of the
database wait for each other, so a store sends its hints after the commit, in a statement of their own, and
several in one (hints.py). A hint names the queues and the runs that it concerns.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_core import FlowStoreError, RunStatus
from flowstore_core.watching import WaitingCalls
from flowstore_postgres.database import Database
from flowstore_postgres.runs import GET_RUN_STATUS
from flowstore_postgres.settings import Settings

log = logging.getLogger("flowstore_postgres")

HINT_PAUSE = 0.005
MAX_HINT_PAUSE = 0.02
"""The least time between two notifications of a store, in seconds. It grows while hints come steadily."""
MAX_PAYLOAD = 7900
"""PostgreSQL refuses a payload of 8,000 bytes; a longer list of topics wakes every call instead."""
FIRST_PAUSE = 0.1
MAX_PAUSE = 10.0
"""Bounds of the backoff between attempts to connect the listener, in seconds."""
HEARTBEAT_SECONDS = 30.0
"""The time between two probes of the listener's connection, which a firewall may have dropped silently."""
LISTEN_TIMEOUT = 10.0
"""How long the server may take to answer a LISTEN, in seconds; then the listener connects again."""
POLL_SECONDS = 1.0
"""The time between two looks at the store while the listener is not connected."""
CLOSE_SECONDS = 1.0

NOTIFY = "SELECT pg_notify($1, $2)"
# The next ready step of each queue and priority, by index. ready_at is infinity for a step that no time makes
# ready.
SECONDS_UNTIL_READY = """
SELECT extract(epoch FROM min(found.ready_at) - coalesce($2, clock_timestamp()))::float8 AS seconds
FROM unnest($1::text[]) AS queues (queue), generate_series(0, 9) AS priorities (priority),
     LATERAL (SELECT ready_at FROM {schema}.pending p
              WHERE p.queue = queues.queue AND p.priority = priorities.priority AND ready_at < 'infinity'
              ORDER BY ready_at LIMIT 1) found
"""


def queue_topic(queue: str) -> str:
    return f"q{queue}"


def run_topic(run_id: UUID) -> str:
    return f"r{run_id}"


def channel_of(schema: str) -> str:
    """The channel of a schema; a hash, because the name of a channel has at most 63 bytes."""
    return "flowstore_" + hashlib.sha256(schema.encode()).hexdigest()[:32]


class Notifier:
    """Sends the hints of one store: at most one notification in a pause, with the topics of all."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._channel = channel_of(schema)
        self._topics: set[str] | None = set()
        """The topics that are not sent yet; None: every topic."""
        self._sending: asyncio.Task[None] | None = None

    def publish(self, *topics: str) -> None:
        """Send a hint soon; without topics it concerns every step."""
        if not topics:
            self._topics = None
        elif self._topics is not None:
            self._topics.update(topics)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        pause = HINT_PAUSE
        while self._topics is None or self._topics:
            payload = "" if self._topics is None else json.dumps(sorted(self._topics))
            self._topics = set()
            try:
                await self._database.read(
                    NOTIFY, self._channel, payload if len(payload) < MAX_PAYLOAD else ""
                )
            except FlowStoreError as error:
                # Only a hint is lost: waiting calls look again at their time-out.
                log.debug("a notification could not be sent: %s", type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_HINT_PAUSE)

    async def aclose(self) -> None:
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=CLOSE_SECONDS)
            self._sending.cancel()


class Listener:
    """The one connection on which the waiting calls of a store listen; the first call opens it."""

    def __init__(self, settings: Settings) -> None:
        self.waiting = WaitingCalls()
        self._settings = settings
        self._channel = channel_of(settings.schema)
        self._task: asyncio.Task[None] | None = None
        self.is_connected = False

    def start(self) -> None:
        """Begin to open the connection, and to replace it whenever it is lost.

        Do not wait for it: a call's time-out holds even if the server does not answer.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await self._listen()
                pause = FIRST_PAUSE
            except Exception as error:  # noqa: BLE001 - waiting calls go on, and look at the store every second
                log.warning("the listener of wait_for_steps cannot connect: %s", type(error).__name__)
            finally:
                self.is_connected = False
            # Every call looks again, because it may have missed a hint.
            self.waiting.wake()
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    async def _listen(self) -> None:
        """Listen until the connection is lost."""
        connection = await self._settings.hosts.connect(**self._settings.connect_arguments)
        try:
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _: lost.set())
            async with asyncio.timeout(LISTEN_TIMEOUT):
                await connection.add_listener(self._channel, self._on_notification)
            self.is_connected = True
            # A look at the store finds the commits from before the connection listened.
            self.waiting.wake()
            while not lost.is_set():
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await lost.wait()
                except TimeoutError:
                    # Not a SELECT: pg_stat_activity shows the last statement of a session.
                    await connection.execute(f"LISTEN {self._channel}", timeout=LISTEN_TIMEOUT)
        finally:
            connection.terminate()

    def _on_notification(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self.waiting.wake(json.loads(payload) if payload else None)

    async def aclose(self) -> None:
        self.waiting.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})


class Watch:
    _database: Database
    _listener: Listener

    async def wait_for_steps(self, *, queues: Sequence[str], timeout: timedelta) -> bool:
        async def look() -> tuple[bool | None, float | None]:
            row = await self._database.read_row(SECONDS_UNTIL_READY, queues, self._database.now())
            seconds: float | None = row["seconds"]
            return (True, None) if seconds is not None and seconds <= 0 else (None, self._next_look(seconds))

        self._listener.start()
        return await self._listener.waiting.wait(look, timeout, [*map(queue_topic, queues)]) or False

    async def wait_for_run(self, *, run_id: UUID, timeout: timedelta) -> RunStatus | None:
        async def look() -> tuple[tuple[RunStatus | None] | None, float | None]:
            row = await self._database.read_row(GET_RUN_STATUS, run_id)
            status = None if row is None else RunStatus(row[0])
            if status is RunStatus.RUNNING:
                return None, self._next_look(None)
            return (status,), None

        self._listener.start()
        found = await self._listener.waiting.wait(look, timeout, [run_topic(run_id)])
        return None if found is None else found[0]

    def _next_look(self, seconds: float | None) -> float | None:
        if self._listener.is_connected:
            return seconds
        return POLL_SECONDS if seconds is None else min(seconds, POLL_SECONDS)
