"""The health of the store: the findings of ``flowstore doctor``."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from flowstore_core.diagnostics import Diagnostic
from flowstore_core.inspection.diagnosis import diagnose_backend, diagnose_schema, worst_first
from flowstore_core.inspection.stalled_work import examine
from flowstore_dashboard.site import Site

GRACE = timedelta(minutes=5)
"""How long work may stall before it is reported."""
RUNS = 1000
"""Number of Running runs that are examined, the oldest first."""
KEPT_SECONDS = 15.0
"""For how long an examination is shown again, because it costs the store more than a page."""


@dataclass(frozen=True, slots=True)
class Health:
    findings: list[Diagnostic]
    running: int
    examined: int
    checked_at: datetime


def split_remedy(remedy: str) -> tuple[str, str]:
    """The words of a remedy, and the command that it ends with, if any."""
    match = re.fullmatch(r"(?:(.*): )?((?:flowstore|pip|python) .*)", remedy, re.DOTALL)
    return (match[1] or "", match[2]) if match else (remedy, "")


class HealthPage:
    path = "/health"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = asyncio.Lock()
        self._latest: tuple[float, Health] | None = None

    async def show(self, request: Request) -> Response:
        health = await self._health()
        minutes = GRACE // timedelta(minutes=1)
        return self._site.render(
            request, "health.html", health=health, minutes=minutes, split_remedy=split_remedy
        )

    async def _health(self) -> Health:
        async with self._lock:
            if self._latest is None or time.monotonic() - self._latest[0] > KEPT_SECONDS:
                self._latest = None
                self._latest = time.monotonic(), await self._examine()
            return self._latest[1]

    async def _examine(self) -> Health:
        site = self._site
        findings = await diagnose_backend(site.plugin, site.backend, site.config)
        findings += await diagnose_schema(site.plugin, site.backend, site.config)
        examination = await examine(site.store, grace=GRACE, limit=RUNS)
        findings += examination.findings
        return Health(worst_first(findings), examination.running, examination.examined, datetime.now(UTC))
