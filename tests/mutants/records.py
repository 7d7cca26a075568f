"""Mutants of texts, timestamps, events and outputs."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from datetime import timedelta, timezone
from typing import Any

from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedSqlite, SqlPatch


@mutant("sqlite", "INP-1")
class StepKeysTrimmed:
    """Trims step keys."""

    async def try_record_dispatch(self, **given: Any) -> bool:
        given["step_key"] = given["step_key"].strip() or given["step_key"]
        return bool(await super().try_record_dispatch(**given))

    async def record_step_start(self, **given: Any) -> int:
        given["step_key"] = given["step_key"].strip() or given["step_key"]
        return int(await super().record_step_start(**given))


@mutant("postgresql", "INP-1")
class LongKeysTruncated:
    """Truncates flow names and trigger keys to 100 characters, as a varchar(100) would."""

    async def start_run(self, **given: Any) -> Any:
        patch_sql = {name: given[name][:100] for name in ("flow_name", "trigger_key")}
        return await super().start_run(**{**given, **patch_sql})


def _reformat(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return json.dumps(json.loads(text))
    except ValueError:
        return text


@mutant("memory", "INP-2")
class JsonReformatted:
    """Parses JSON and serialises it again, as a jsonb column does."""

    async def start_run(self, **given: Any) -> Any:
        return await super().start_run(**{**given, "trigger_data": _reformat(given["trigger_data"])})

    async def record_step_start(self, **given: Any) -> int:
        return int(await super().record_step_start(**{**given, "input_json": _reformat(given["input_json"])}))

    async def record_step_complete(self, **given: Any) -> None:
        await super().record_step_complete(**{**given, "output_json": _reformat(given["output_json"])})

    async def save_output(self, **given: Any) -> None:
        await super().save_output(**{**given, "value_json": _reformat(given["value_json"])})

    async def deliver_signal(self, **given: Any) -> Any:
        return await super().deliver_signal(**{**given, "payload_json": _reformat(given["payload_json"])})


@mutant("sqlite", "INP-2")
class EmptyTextIsNone:
    """Stores an empty text as None."""

    async def record_step_complete(self, **given: Any) -> None:
        given["output_json"] = given["output_json"] or None
        given["error_message"] = given["error_message"] or None
        await super().record_step_complete(**given)

    async def start_run(self, **given: Any) -> Any:
        return await super().start_run(**{**given, "trigger_data": given["trigger_data"] or None})


@mutant("postgresql", "INP-2")
class ErrorsTruncated:
    """Truncates error messages to 64 KiB."""

    async def record_step_complete(self, **given: Any) -> None:
        if given["error_message"] is not None:
            given["error_message"] = given["error_message"][: 64 * 1024]
        await super().record_step_complete(**given)


@mutant("sqlite", "INP-3")
class TimesTruncatedToSeconds:
    """Truncates deadlines to whole seconds."""

    async def configure_run(self, **given: Any) -> None:
        if given["timeout_at"] is not None:
            given["timeout_at"] = given["timeout_at"].replace(microsecond=0)
        await super().configure_run(**given)

    async def register_waiter(self, **given: Any) -> None:
        if given["expires_at"] is not None:
            given["expires_at"] = given["expires_at"].replace(microsecond=0)
        await super().register_waiter(**given)


@mutant("memory", "INP-3")
class TimesInLocalZone:
    """Returns deadlines in its local time zone."""

    async def get_run_control(self, **given: Any) -> Any:
        record = await super().get_run_control(**given)
        if record is None or record.timeout_at is None:
            return record
        zone = timezone(timedelta(hours=2))
        return replace(record, timeout_at=record.timeout_at.astimezone(zone))


@mutant("postgresql", "EVT-1", concurrent=True)
class EventNumberReservedEarly:
    """Reserves the number in one transaction and writes the event in the next: 6 can be visible before 5."""

    async def append_event(self, **given: Any) -> int:
        database = self._database
        if await super().get_run_status(run_id=given["run_id"]) is None:
            return int(await super().append_event(**given))

        async def count(transaction: Any) -> int:
            statement = (
                "UPDATE {schema}.runs SET last_event = last_event + 1 WHERE run_id = $1 RETURNING last_event"
            )
            return int((await transaction.row(statement, given["run_id"]))[0])

        number = await database.transaction("append_event", count)
        await asyncio.sleep(random.random() * 0.1)

        async def write(transaction: Any) -> None:
            statement = """
                INSERT INTO {schema}.events
                    (run_id, sequence, timestamp, event_type, step_key, message, token)
                VALUES ($1, $2, coalesce($3, clock_timestamp()), $4, $5, $6, gen_random_uuid())
            """
            texts = (given["event_type"], given["step_key"], given["message"])
            await transaction.execute(statement, given["run_id"], number, transaction.now, *texts)

        await database.transaction("append_event", write)
        return number


@mutant("memory", "EVT-1")
class EventsAfterInclusive:
    """Returns the event at ``after`` again."""

    async def get_run_events(self, **given: Any) -> Any:
        return await super().get_run_events(**{**given, "after": max(given["after"] - 1, 0)})


@mutant("memory", "EVT-1")
class EventsDeclaredButDropped:
    """Declares EVENTS and discards every event."""

    async def append_event(self, **given: Any) -> int:
        self._runs[given["run_id"].int]
        return 0

    async def get_run_events(self, **given: Any) -> Any:
        return ()


@mutant("sqlite", "EVT-2")
class FirstOutputWins(PatchedSqlite):
    """Keeps the first output saved under a key."""

    patch_sql = SqlPatch((r"DO UPDATE SET value_json = excluded\.value_json", "DO NOTHING"))


@mutant("sqlite", "EVT-2")
class PrefixIsAPattern(PatchedSqlite):
    """Deletes outputs by LIKE, which folds case, and in which % and _ match other characters."""

    patch_sql = SqlPatch(
        (
            r"(DELETE FROM outputs WHERE run_id = \?1?) AND output_key >= \? AND output_key < \?",
            r"\1 AND output_key LIKE ? || '%' AND ? IS NOT NULL",
        )
    )


@mutant("memory", "EVT-2", concurrent=True)
class OutputsDeletedOneByOne:
    """Reads the keys with the prefix, and deletes the outputs one after the other."""

    async def delete_outputs(self, **given: Any) -> int:
        keys = await super().get_outputs(**given, after=None, take=None)
        for key in keys:
            await asyncio.sleep(0)
            await super().delete_outputs(run_id=given["run_id"], prefix=key)
        return len(keys)


@mutant("memory", "EVT-2", concurrent=True)
class OutputsSavedOneByOne:
    """Saves the outputs of one call in several transactions."""

    async def save_outputs(self, **given: Any) -> None:
        for key, value in given["outputs"].items():
            await super().save_output(run_id=given["run_id"], key=key, value_json=value)
            await asyncio.sleep(0)


@mutant("sqlite", "EVT-2")
class SavedOutputsReplaceAll:
    """Deletes the run's other outputs when it saves several."""

    async def save_outputs(self, **given: Any) -> None:
        await super().delete_outputs(run_id=given["run_id"], prefix="")
        await super().save_outputs(**given)


@mutant("memory", "INP-2", concurrent=True)
class TextsJoinedBySeparator:
    """Joins the inputs of concurrent starts into one text and splits it at a separator."""

    async def record_step_start(self, **given: Any) -> int:
        waiting: list[str] = self.__dict__.setdefault("_joined", [])
        index = len(waiting)
        waiting.append(given["input_json"] or "")
        await asyncio.sleep(0)
        self.__dict__.pop("_joined", None)
        if given["input_json"] is not None:
            given["input_json"] = "\x1f".join(waiting).split("\x1f")[index]
        return int(await super().record_step_start(**given))
