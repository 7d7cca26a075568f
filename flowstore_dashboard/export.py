"""The page of a run as one file that contains everything it needs, for a bug report."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from markupsafe import Markup

from flowstore_core import FlowStore
from flowstore_dashboard.run import describe_run, read_run
from flowstore_dashboard.site import FOLDER, templates

MAX_STEPS = 5000


async def export_run(store: FlowStore, run_id: UUID, where: str) -> str:
    """The HTML of a run, without scripts, links and actions. Raises RunNotFoundError.

    ``where`` names the store in the footer; it must contain no secret.
    """
    now = datetime.now(UTC)
    values = describe_run(await read_run(store, run_id), now, most=MAX_STEPS)
    style = Markup((FOLDER / "static" / "dashboard.css").read_text(encoding="utf-8"))
    return templates().get_template("export.html").render(style=style, now=now, where=where, **values)
