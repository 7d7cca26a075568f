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

    def get_output(self, run_id: UUID, key: str) -> str | None:
        """Return one output, else None (EVT-2)."""
        return self.get(run_id).outputs.get(key)

    def get_outputs(self, run_id: UUID) -> Mapping[str, str]:
        """Return every output of the run, ordered by key (EVT-2)."""
        return dict(sorted(self.get(run_id).outputs.items()))
