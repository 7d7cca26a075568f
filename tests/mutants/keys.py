"""Mutants of idempotency keys and triggers."""

from __future__ import annotations

import asyncio
from typing import Any

from flowstore_core import RunAlreadyExistsError, TriggerResult
from tests.mutants import mutant
from tests.mutants.queues import dispatch_one_by_one
from tests.mutants.sql_patching import PatchedSqlite, SqlPatch

_RUN = ("flow_id", "flow_name", "run_id", "trigger_key", "trigger_data", "job_id", "source_run_id")
_SCOPE = ("flow_id", "trigger_key", "idempotency_key")


class _Normalised:
    """Transforms every idempotency key before use."""

    @staticmethod
    def change(key: str) -> str:
        raise NotImplementedError

    def _changed(self, given: Any) -> Any:
        key = given["idempotency_key"]
        return {**given, "idempotency_key": key if key is None else self.change(key) or key}

    async def find_run_id_by_idempotency_key(self, **given: Any) -> Any:
        return await super().find_run_id_by_idempotency_key(**self._changed(given))  # type: ignore[misc]

    async def try_register_idempotency_key(self, **given: Any) -> Any:
        return await super().try_register_idempotency_key(**self._changed(given))  # type: ignore[misc]

    async def trigger_run(self, **given: Any) -> Any:
        return await super().trigger_run(**self._changed(given))  # type: ignore[misc]


@mutant("memory", "IDM-1")
class KeysCaseFolded(_Normalised):
    """Lower-cases idempotency keys."""

    change = staticmethod(str.lower)


@mutant("postgresql", "IDM-1")
class KeysTrimmed(_Normalised):
    """Trims idempotency keys."""

    change = staticmethod(str.strip)


@mutant("sqlite", "IDM-1")
class KeysIgnoreTrigger(PatchedSqlite):
    """Omits the trigger from a key's scope."""

    def bind(self, statement: str, values: Any) -> Any:
        if "idempotency_key = ?" in statement or "INSERT INTO idempotency_keys" in statement:
            return (values[0], "any", *values[2:])
        return values


@mutant("memory", "IDM-1")
class KeysIgnoreFlow:
    """Finds a key of another flow."""

    async def find_run_id_by_idempotency_key(self, **given: Any) -> Any:
        found = await super().find_run_id_by_idempotency_key(**given)
        for (_, trigger_key, key), registered in self._namespace.keys.items():
            if found is None and (trigger_key, key) == (given["trigger_key"], given["idempotency_key"]):
                return registered.run_id
        return found


@mutant("postgresql", "IDM-2", concurrent=True)
class KeyCheckThenRegister:
    """Looks the key up, then registers it: every concurrent caller gets True."""

    async def try_register_idempotency_key(self, **given: Any) -> bool:
        scope = {name: given[name] for name in _SCOPE}
        found = await super().find_run_id_by_idempotency_key(**scope)
        if found is not None:
            return bool(found == given["run_id"])
        await super().try_register_idempotency_key(**given)
        return True


@mutant("sqlite", "IDM-2")
class LastRegistrationWins(PatchedSqlite):
    """Gives the key to the last registration."""

    patch_sql = SqlPatch(
        (
            r"ON CONFLICT \(flow_id, trigger_key, idempotency_key\) DO NOTHING",
            "ON CONFLICT (flow_id, trigger_key, idempotency_key) DO UPDATE SET run_id = excluded.run_id",
        )
    )

    async def trigger_run(self, **given: Any) -> Any:
        self.patch_sql = SqlPatch()
        try:
            return await super().trigger_run(**given)
        finally:
            del self.patch_sql


@mutant("memory", "IDM-2")
class RepeatedRegistrationRefused:
    """Returns False to the run that already holds the key."""

    async def try_register_idempotency_key(self, **given: Any) -> bool:
        scope = {name: given[name] for name in _SCOPE}
        if await super().find_run_id_by_idempotency_key(**scope) is not None:
            return False
        return bool(await super().try_register_idempotency_key(**given))


async def _trigger_in_three_calls(store: Any, given: Any) -> Any:
    """Trigger a run by three calls of simpler operations."""
    run = {name: given[name] for name in _RUN}
    key = {name: given[name] for name in _SCOPE}
    chosen = given["run_id"]
    if given["idempotency_key"] is not None:
        found = await store.find_run_id_by_idempotency_key(**key)
        if found is None and await store.get_run_status(run_id=chosen) is not None:
            raise RunAlreadyExistsError(chosen)
        await asyncio.sleep(0)
        if not await store.try_register_idempotency_key(**key, run_id=chosen):
            chosen = await store.find_run_id_by_idempotency_key(**key)
        runs = await store.get_runs(flow_id=given["flow_id"], after=None, skip=0, take=1000)
        existing = next((one for one in runs if one.run_id == chosen), None)
        if existing is not None:
            return TriggerResult(run=existing, created=False)
    await asyncio.sleep(0)
    started = await store.start_run(**{**run, "run_id": chosen})
    await asyncio.sleep(0)
    await store.configure_run(**{name: given[name] for name in (*_SCOPE, "timeout_at")}, run_id=chosen)
    return TriggerResult(run=started, created=True)


@mutant("memory", "IDM-3", concurrent=True)
class TriggerInThreeSteps:
    """Registers the key, starts the run and configures it in separate steps."""

    async def trigger_run(self, **given: Any) -> Any:
        return await _trigger_in_three_calls(super(), given)


@mutant("sqlite", "CON-4")
class TriggerInThreeTransactions:
    """Registers the key, starts the run and configures it in three transactions."""

    async def trigger_run(self, **given: Any) -> Any:
        return await _trigger_in_three_calls(super(), given)


@mutant("memory", "IDM-3")
class RefusedTriggerKeepsKey:
    """Refuses a stored run_id but leaves the key registered."""

    async def trigger_run(self, **given: Any) -> Any:
        try:
            return await super().trigger_run(**given)
        except RunAlreadyExistsError:
            if given["idempotency_key"] is not None:
                await super().try_register_idempotency_key(
                    **{name: given[name] for name in _SCOPE}, run_id=given["run_id"]
                )
            raise


@mutant("postgresql", "IDM-3")
class RepeatedTriggerConfigures:
    """Overwrites the deadline of the existing run when a trigger is repeated."""

    async def trigger_run(self, **given: Any) -> Any:
        result = await super().trigger_run(**given)
        if not result.created:
            await super().configure_run(
                **{name: given[name] for name in (*_SCOPE, "timeout_at")}, run_id=result.run.run_id
            )
        return result


@mutant("sqlite", "IDM-3")
class UnstartedKeySwallowsTriggers:
    """Treats a registered key as an existing run although that run never started."""

    async def trigger_run(self, **given: Any) -> Any:
        if given["idempotency_key"] is not None:
            found = await super().find_run_id_by_idempotency_key(**{name: given[name] for name in _SCOPE})
            if found is not None and await super().get_run_status(run_id=found) is None:
                given = {**given, "idempotency_key": None}
        return await super().trigger_run(**given)


@mutant("sqlite", "CON-4")
class KeylessTriggerInTwoTransactions:
    """Triggers a run without a key in one transaction and dispatches its steps in the next."""

    async def trigger_run(self, **given: Any) -> Any:
        if given["idempotency_key"] is not None:
            return await super().trigger_run(**given)
        result = await super().trigger_run(**{**given, "dispatch": ()})
        await dispatch_one_by_one(self, given["run_id"], given["dispatch"])
        return result
