"""Claiming a step and starting its attempt in one call."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from flowstore_conformance.model.claims import Claims
from flowstore_conformance.model.steps import Steps


class Starts(Steps, Claims):
    """Claims that start an attempt."""

    def try_start_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        owner: str,
        lease: timedelta,
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> int | None:
        """Claim the step and, if that succeeds, start it as the owner of the claim (CLM-8)."""
        if not self.try_claim_step(run_id, step_key, owner=owner, lease=lease):
            return None
        return self.record_step_start(
            run_id, step_key, step_type, input_json=input_json, job_id=job_id, owner=owner
        )
