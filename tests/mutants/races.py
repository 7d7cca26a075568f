"""Mutants that lose or restore an effect only when two different operations run concurrently."""

from __future__ import annotations

import asyncio
from typing import Any

from flowstore_core import RunNotFoundError
from tests.mutants import mutant


@mutant("sqlite", "CON-1", concurrent=True)
class ReleasesShareABatch:
    """Batches the releases of claims and dispatches by step, so that one release replaces another one of the
    same step in its batch."""

    def begin(self) -> None:
        self._releases: dict[Any, Any] = {}

    async def _in_batch(self, release: Any, given: Any) -> None:
        key = given["run_id"], given["step_key"]
        self._releases[key] = release
        await asyncio.sleep(0)
        if self._releases.get(key) is release:
            del self._releases[key]
            await release(**given)

    async def release_step_claim(self, **given: Any) -> None:
        await self._in_batch(super().release_step_claim, given)

    async def release_dispatch(self, **given: Any) -> None:
        await self._in_batch(super().release_dispatch, given)


@mutant("sqlite", "RET-1", concurrent=True)
class OutputSavedAfterCleanup:
    """Finds the run in one transaction and inserts the output in the next, when the run may be deleted."""

    async def save_output(self, **given: Any) -> None:
        if await super().get_run_status(run_id=given["run_id"]) is None:
            raise RunNotFoundError(given["run_id"])
        await self._database.write(
            lambda db, now: db.execute(
                "INSERT OR REPLACE INTO outputs (run_id, output_key, value_json) VALUES (?, ?, ?)",
                (given["run_id"].bytes, given["key"], given["value_json"]),
            )
        )


@mutant("postgresql", "CON-1", concurrent=True)
class RenewalRestoresReleasedClaim:
    """Checks that the owner holds the claim, and then writes the claim anew, although it may have been
    released in between."""

    async def renew_step_claim(self, **given: Any) -> bool:
        step = {"run_id": given["run_id"], "step_key": given["step_key"]}
        renewed = await super().renew_step_claim(**given)
        if renewed:
            claims = await super().get_step_claims(run_id=given["run_id"])
            if given["step_key"] not in {claim.step_key for claim in claims}:
                await super().try_claim_step(**step, owner=given["owner"], lease=given.get("lease"))
        return bool(renewed)


@mutant("sqlite", "CON-1", concurrent=True)
class TriggerRestoresLatches:
    """Reads the latches before it triggers a run, and writes them with its control record: a cancel that was
    requested in between is lost."""

    async def trigger_run(self, **given: Any) -> Any:
        row = (given["run_id"].bytes,)
        latches = await self._database.read(
            lambda db: db.execute(
                "SELECT cancelled_at, cancel_reason, timed_out_at, timed_out_reason FROM controls "
                "WHERE run_id = ?",
                row,
            ).fetchone()
        )
        result = await super().trigger_run(**given)
        if result.created and latches is not None and result.run.run_id == given["run_id"]:
            await self._database.write(
                lambda db, now: db.execute(
                    "UPDATE controls SET cancelled_at = ?, cancel_reason = ?, timed_out_at = ?, "
                    "timed_out_reason = ? WHERE run_id = ?",
                    (*latches, *row),
                )
            )
        return result


@mutant("sqlite", "CON-1", concurrent=True)
class DispatchReleaseRestoresClaim:
    """Reads the row of a step, and writes it back without its dispatch: a claim that was made, renewed or
    released in between is undone."""

    async def release_dispatch(self, **given: Any) -> None:
        row = (given["run_id"].bytes, given["step_key"])
        claim = await self._database.read(
            lambda db: db.execute(
                "SELECT claimed_at, expires_at, claim_owner, claim_token FROM steps "
                "WHERE run_id = ? AND step_key = ?",
                row,
            ).fetchone()
        )
        await super().release_dispatch(**given)
        if claim is not None:
            await self._database.write(
                lambda db, now: db.execute(
                    "UPDATE steps SET claimed_at = ?, expires_at = ?, claim_owner = ?, claim_token = ? "
                    "WHERE run_id = ? AND step_key = ?",
                    (*claim, *row),
                )
            )


@mutant("memory", "CON-1", concurrent=True)
class CancelRestoresTheIdempotencyKey:
    """Reads the control record, and writes its idempotency key back with the cancel: a key that was
    configured in between is undone."""

    async def request_cancel(self, **given: Any) -> bool:
        state = self._namespace.controls.get(given["run_id"])
        before = None if state is None else state.idempotency_key
        await asyncio.sleep(0)
        cancelled = await super().request_cancel(**given)
        if cancelled and state is not None:
            state.idempotency_key = before
        return bool(cancelled)
