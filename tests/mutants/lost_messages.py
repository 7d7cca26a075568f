"""Mutants that mishandle lost replies and late requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowstore_core import OutcomeUnknownError, StoreUnavailableError
from flowstore_core.instrumentation import NO_OBSERVERS
from flowstore_postgres.outputs import SAVE_ONE, SAVE_OUTPUT, SAVE_OUTPUT_SINGLE
from flowstore_postgres.retry_loop import RetryLoop
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, SqlPatch


@mutant("postgresql", "CON-3")
class LostReplyRepeatsTheEvent(PatchedPostgres):
    """Repeats append_event after a lost reply without looking for the token of the first event."""

    patch_sql = SqlPatch((r"FROM \{schema\}\.events WHERE run_id = \$1 AND token = \$2", r"\g<0> AND false"))


@mutant("postgresql", "CON-3")
class LostReplySavesTheOutputAgain:
    """Looks for an output whose reply was lost by its value, and saves it again if it was replaced."""

    def begin(self) -> None:
        database: Any = self._database
        write = database.write
        by_value = replace(
            SAVE_ONE,
            batch_sql=SAVE_OUTPUT,
            single_sql=SAVE_OUTPUT_SINGLE,
            probe_sql="SELECT FROM {schema}.outputs WHERE run_id = $1 AND key = $2 AND value_json = $3",
        )
        database.write = lambda statement, *rest: write(
            by_value if statement is SAVE_ONE else statement, *rest
        )


@mutant("postgresql", "CON-3")
class LostReplyRefusesTheTrigger:
    """Sends a trigger without a key again after a lost reply, and then finds that the run exists."""

    def begin(self) -> None:
        database: Any = self._database
        statement = database.statement

        async def without_probe(operation: str, sql: str, *arguments: Any, probe: Any, **options: Any) -> Any:
            probe = None if operation == "trigger_run" else probe
            return await statement(operation, sql, *arguments, probe=probe, **options)

        database.statement = without_probe


@mutant("postgresql", "CON-3")
class LostReplyIsAFailure:
    """Reports a write whose reply was lost as not having happened."""

    def begin(self) -> None:
        self._database.pool.retries = RetryLoop(0.0, NO_OBSERVERS)

    async def request_cancel(self, **given: Any) -> bool:
        try:
            return bool(await super().request_cancel(**given))
        except OutcomeUnknownError:
            raise StoreUnavailableError("the connection was lost") from None


@mutant("postgresql", "CON-3")
class LateStatementTakesEffect(PatchedPostgres):
    """Neither waits for an unacknowledged statement nor lets it expire, so that it takes effect later."""

    patch_sql = SqlPatch(
        (r"WHERE pid = \$1 AND backend_start = \$2", "WHERE pid = $1 AND backend_start = $2 AND false"),
        (r"clock_timestamp\(\) < \$1", "(clock_timestamp() < $1 OR true)"),
    )
