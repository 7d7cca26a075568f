"""Mutants of tags and of lists by tag."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from flowstore_core import ConflictError, RunPage, TriggerResult
from flowstore_core.tags import MAX_TAGS
from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, PatchedSqlite, SqlPatch


@mutant("memory", "TAG-1")
class RepeatedTriggerSetsTags:
    """trigger_run with a taken key sets the tags of its call on the run of the key."""

    async def trigger_run(self, *, tags: Any = (), **given: Any) -> Any:
        result = await super().trigger_run(**given, **({"tags": tags} if tags else {}))
        if not result.created and tags:
            await super().set_tags(run_id=result.run.run_id, tags=tags)
            return TriggerResult(run=await super().get_run(result.run.run_id), created=False)
        return result


@mutant("memory", "TAG-1")
class DerivedRunsInheritTags:
    """A derived run begins with the tags of its source."""

    async def start_run(self, *, tags: Any = (), **given: Any) -> Any:
        source = await super().get_run(given["source_run_id"]) if given["source_run_id"] else None
        merged = {**dict(source.tags if source else ()), **dict(tags)}
        return await super().start_run(**given, **({"tags": merged} if merged else {}))


@mutant("sqlite", "TAG-1")
class TagsOrderedByLowerCase:
    """Orders the tags of a run without regard to case."""

    async def get_run(self, **given: Any) -> Any:
        run = await super().get_run(**given)
        return run and replace(run, tags=tuple(sorted(run.tags, key=lambda tag: tag[0].lower())))


@mutant("memory", "TAG-1")
class TagsSurviveTheirRun:
    """A new run with the id of a deleted one gets its tags."""

    def begin(self) -> None:
        self._tags_of_deleted: dict[Any, Any] = {}

    async def delete_run(self, **given: Any) -> Any:
        run = await super().get_run(**given)
        deleted = await super().delete_run(**given)
        if deleted:
            self._tags_of_deleted[given["run_id"]] = dict(run.tags)
        return deleted

    async def start_run(self, *, tags: Any = (), **given: Any) -> Any:
        merged = {**self._tags_of_deleted.get(given["run_id"], {}), **dict(tags)}
        return await super().start_run(**given, **({"tags": merged} if merged else {}))


@mutant("sqlite", "TAG-2")
class SetTagsReplacesAll:
    """set_tags removes the keys that it does not name."""

    async def set_tags(self, **given: Any) -> None:
        run = await super().get_run(run_id=given["run_id"])
        others = dict.fromkeys(key for key, _ in (run.tags if run else ()))
        await super().set_tags(run_id=given["run_id"], tags={**others, **given["tags"]})


@mutant("memory", "TAG-2")
class LimitCountsEveryKey:
    """Counts the keys of the call on top of those of the run, removed and replaced ones too."""

    async def set_tags(self, **given: Any) -> None:
        run = await super().get_run(given["run_id"])
        if run is not None and len(run.tags) + len(given["tags"]) > MAX_TAGS:
            raise ConflictError("too many tags", run_id=given["run_id"])
        await super().set_tags(**given)


@mutant("memory", "TAG-2")
class RefusedTagsAreRemoved:
    """Removes keys before it finds that too many tags are to be set."""

    async def set_tags(self, **given: Any) -> None:
        removed = {key: value for key, value in given["tags"].items() if value is None}
        await super().set_tags(run_id=given["run_id"], tags=removed)
        await super().set_tags(**given)


@mutant("postgresql", "TAG-2", concurrent=True)
class TagsMergedWithoutLock(PatchedPostgres):
    """Reads the tags without a lock on the run, so that concurrent changes are lost."""

    patch_sql = SqlPatch((r"FOR NO KEY UPDATE$", ""))


@mutant("sqlite", "TAG-2", concurrent=True)
class TagsSetOneByOne:
    """Sets each tag in a transaction of its own."""

    async def set_tags(self, **given: Any) -> None:
        for key, value in given["tags"].items() or [(None, None)]:
            await super().set_tags(run_id=given["run_id"], tags={} if key is None else {key: value})
            await asyncio.sleep(0)


@mutant("memory", "TAG-3")
class AnyTagIsEnough:
    """Lists the runs that have at least one of the tags."""

    async def get_runs(self, **given: Any) -> Any:
        tags = given.get("tags")
        if not tags:
            return await super().get_runs(**given)
        found = await super().get_runs(flow_id=given["flow_id"], after=given["after"], take=1_000_000)
        matching = tuple(run for run in found if set(run.tags) & set(tags.items()))
        return matching[given["skip"] : given["skip"] + given["take"]]


@mutant("postgresql", "TAG-3")
class TagsWithoutCase(PatchedPostgres):
    """Compares the values of tags without regard to case."""

    patch_sql = SqlPatch((r"r\.tag_value = (\$\d+)", r"lower(r.tag_value) = lower(\1)"))


@mutant("sqlite", "TAG-3")
class FurtherTagsIgnored(PatchedSqlite):
    """Filters by the rarest tag only."""

    patch_sql = SqlPatch((r"(?s)AND EXISTS \(\s*SELECT 1 FROM run_tags\s+WHERE [^)]*\)", ""))


@mutant("postgresql", "TAG-3")
class TagsIgnoreStatus(PatchedPostgres):
    """Ignores the status of a page by tag."""

    patch_sql = SqlPatch(
        (r"r\.status = '(Failed|Running)' AND r\.tag_key", "r.tag_key"),
        (r"WHERE status = '\w+' AND r\.tag_key", "WHERE r.tag_key"),
    )


@mutant("sqlite", "TAG-3")
class TotalIgnoresTags:
    """total_count counts the runs without the tags too."""

    async def get_runs_page(self, **given: Any) -> Any:
        page = await super().get_runs_page(**given)
        given.pop("tags", None)
        return RunPage(runs=page.runs, total_count=(await super().get_runs_page(**given)).total_count)


@mutant("postgresql", "TAG-3")
class ChangedTagsNotIndexed(PatchedPostgres):
    """Changes the tags of a run without the index."""

    patch_sql = SqlPatch(
        (
            r"UPDATE \{schema\}\.runs SET tags = \$2::jsonb WHERE run_id = \$1",
            "WITH off AS MATERIALIZED (SELECT set_config('session_replication_role', 'replica', true) off) "
            "UPDATE {schema}.runs SET tags = $2::jsonb FROM off WHERE run_id = $1 AND off.off <> ''",
        )
    )


@mutant("memory", "TAG-3")
class SearchIgnoresTags:
    """A search finds the runs without the tags too."""

    async def get_runs_page(self, **given: Any) -> Any:
        if given["search"] is not None:
            given.pop("tags", None)
        return await super().get_runs_page(**given)


@mutant("postgresql", "TAG-3")
class PagesByTagBeginAnew(PatchedPostgres):
    """Ignores the position after which a page by tag begins."""

    patch_sql = SqlPatch(
        (r"(?s)(run_tags r\s+WHERE .*?) AND \(r\.started_at, r\.run_id\) < \(\$\d+, \$\d+\)", r"\1")
    )
