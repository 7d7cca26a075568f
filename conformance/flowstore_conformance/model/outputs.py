"""Outputs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from flowstore_conformance.model.state import Base


class Outputs(Base):
    """Saving and reading outputs."""

    def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        """Store the output; the last write of a key wins (EVT-2, UNK)."""
        run, _ = self.require(run_id)
        run.outputs[key] = value_json

    def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        """Store every output at once (EVT-2, UNK)."""
        run, _ = self.require(run_id)
        run.outputs.update(outputs)

    def get_output(self, run_id: UUID, key: str) -> str | None:
        """Return one output, else None (EVT-2)."""
        return self.get(run_id).outputs.get(key)

    def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        """Return the outputs with the prefix after a key, ordered by key, at most ``take`` (EVT-2)."""
        found = sorted(self.get(run_id).outputs.items())
        wanted = [
            (key, value)
            for key, value in found
            if key[: len(prefix)] == prefix and (after is None or after < key)
        ]
        return dict(wanted[:take])

    def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        """Delete the outputs with the prefix and return their number (EVT-2, UNK)."""
        outputs = self.get(run_id).outputs
        gone = [key for key in outputs if key[: len(prefix)] == prefix]
        for key in gone:
            del outputs[key]
        return len(gone)
