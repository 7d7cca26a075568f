"""The outputs of a run, by key (EVT-2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol
from uuid import UUID


class Outputs(Protocol):
    """Capability OUTPUTS: a key-value store for each run."""

    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        """Store a value under a key; the last write wins. Raises RunNotFoundError."""
        ...

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        """The value, unchanged; None if there is none."""
        ...

    async def get_outputs(self, run_id: UUID) -> Mapping[str, str]:
        """All outputs of a run, read-only, ordered by key; empty for an unknown run."""
        ...
