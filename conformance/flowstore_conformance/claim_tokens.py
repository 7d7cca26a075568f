"""The owners of claims that claim_next_steps made: random in a store, symbolic in the model and in calls."""

from __future__ import annotations

from uuid import UUID

MIN_LENGTH = 16
"""Shortest length of a random owner. The owners that the suite chooses are shorter where it compares them."""
ANY_OWNER = "<token>"
"""Replaces every random owner in comparable results."""


class ClaimToken(str):
    """The owner of the newest claim of a step by claim_next_steps.

    It is the owner in the model, and the argument of calls that are drawn before a store makes the claim.
    """

    run_id: UUID
    step_key: str

    @staticmethod
    def of(run_id: UUID, step_key: str) -> ClaimToken:
        token = ClaimToken(f"owner of {step_key} of {run_id.hex}")
        token.run_id, token.step_key = run_id, step_key
        return token


def comparable_owner(owner: object) -> object:
    """An owner for comparisons: all random ones are equal."""
    return ANY_OWNER if isinstance(owner, str) and len(owner) >= MIN_LENGTH else owner
