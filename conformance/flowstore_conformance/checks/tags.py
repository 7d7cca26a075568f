"""TAG: the tags of runs, and finding runs by them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    SECOND,
    SIMILAR_KEYS,
    TERMINAL_RUN_STATUSES,
    TICK,
    advance,
    assert_same,
    expect_fields,
    expect_present,
    new_id,
    now,
    observe,
    outcome_of,
    run_step,
    second_store,
    single,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability, ConflictError, FlowRunRecord, RunStatus, StepStatus, TriggerResult

LIMIT = 32


def _wide(size: int) -> str:
    """A text of characters of four bytes that has at most this number of bytes."""
    return "\U0001f600" * (size // 4)


async def _tags(context: CheckContext, run_id: UUID) -> tuple[tuple[str, str], ...]:
    return expect_present(await context.store.get_run(run_id), "get_run of a stored run").tags


async def _listed(context: CheckContext, tags: Mapping[str, str], **given: Any) -> list[UUID]:
    """The runs with these tags, from get_runs and, if there is one, get_runs_page, which must agree."""
    runs = [run.run_id for run in await context.store.get_runs(tags=tags, **given)]
    if Capability.DASHBOARD in context.capabilities:
        page = await context.store.get_runs_page(tags=tags, **given)
        listed = [run.run_id for run in page.runs]
        context.expect(listed, runs, f"get_runs_page(tags={tags}) compared with get_runs")
    return runs


@example("TAG-1")
async def every_record_of_a_run_has_its_tags(context: CheckContext) -> None:
    """start_run and trigger_run give a run its tags; every read shows them, ordered by code point."""
    store, can = context.store, context.capabilities
    tags = {"b": "1", "\U0001f600": "2", "\uffff": "3", "B": "4", "a": "5", "é": "6", "aa": "7"}
    ordered = tuple(sorted(tags.items()))
    source = await start(context)
    context.expect(await _tags(context, source), (), "the tags of a run without tags")
    started = [await store.start_run(FLOW, "orders", new_id(context), "m", source_run_id=source, tags=tags)]
    if Capability.TRIGGER in can:
        for key in (None, f"{new_id(context)}"):
            result = await store.trigger_run(
                FLOW, "orders", new_id(context), "m", idempotency_key=key, source_run_id=source, tags=tags
            )
            started.append(result.run)
    for run in started:
        run_id, flow = run.run_id, FLOW
        records: list[tuple[str, FlowRunRecord | None]] = [
            ("the result of the start", run),
            ("get_run", await store.get_run(run_id)),
            ("get_run_detail", await store.get_run_detail(run_id)),
        ]
        lists = [
            ("get_runs", await store.get_runs(flow, take=context.page_size)),
            (
                "get_runs with tags",
                await store.get_runs(flow, take=context.page_size, tags={"aa": "7"}),
            ),
            ("get_active_runs", await store.get_active_runs()),
            ("get_derived_runs", await store.get_derived_runs(source)),
        ]
        if Capability.DASHBOARD in can:
            for name, given in (
                ("", {}),
                (" with tags", {"tags": tags}),
                (" that searches", {"search": str(run_id)}),
            ):
                page = await store.get_runs_page(flow, take=context.page_size, **given)
                lists.append((f"get_runs_page{name}", page.runs))
        if Capability.DEADLINES in can:
            await store.request_cancel(run_id)
            lists.append(("get_runs_to_stop", await store.get_runs_to_stop(take=context.page_size)))
        for name, runs in lists:
            records.append(
                (name, single([one for one in runs if one.run_id == run_id], f"the run in {name}"))
            )
        for name, record in records:
            context.expect(expect_present(record, name).tags, ordered, f"the tags of a run in {name}")


@example("TAG-1")
async def tags_are_compared_exactly(context: CheckContext) -> None:
    """Similar keys and values are different ones: case, blanks, accents and wildcards count."""
    value = f"{new_id(context)}"
    by_key = {key: await start(context, tags={key: value}) for key in SIMILAR_KEYS}
    for key, run_id in by_key.items():
        context.expect(await _listed(context, {key: value}), [run_id], f"the runs with the key {key!r}")
    tag = f"{new_id(context)}"
    by_value = {value: await start(context, tags={tag: value}) for value in SIMILAR_KEYS}
    for value, run_id in by_value.items():
        context.expect(await _listed(context, {tag: value}), [run_id], f"the runs with the value {value!r}")
    # Characters with a meaning in JSON, SQL, arrays and patterns.
    for text in (
        '"',
        "\\",
        '{"a": 1}',
        "[]",
        "{}",
        "null",
        "'; --",
        "%",
        "*",
        "\x01",
        "\x7f",
        "\u2028",
        "\\u0000",
    ):
        run_id = await start(context, tags={text: value, tag: text})
        context.expect(
            dict(await _tags(context, run_id)), {text: value, tag: text}, f"the tags with {text!r}"
        )
        context.expect(await _listed(context, {tag: text}), [run_id], f"the runs with the value {text!r}")
        context.expect(run_id in await _listed(context, {text: value}), True, f"whether {text!r} is found")


@example("TAG-1")
async def the_largest_tags_are_kept(context: CheckContext) -> None:
    """32 tags with keys and values of 256 characters of four bytes each round-trip and are found."""
    own = f"{new_id(context)}"
    room = context.limits.key_bytes
    key_start, value = _wide(room - 2)[:254], f"{own}{_wide(room - len(own))}"[:256]
    tags = {f"{key_start}{number:02}": value for number in range(LIMIT)}
    run_id = await start(context, tags=tags)
    context.expect(dict(await _tags(context, run_id)), tags, "the largest tags")
    context.expect(await _listed(context, tags), [run_id], "the runs with 32 tags")
    key, value = next(iter(tags.items()))
    for similar in ({key: value[:-1]}, {key[:-1]: value}, {key: f"{value[:-1]}x"}):
        context.expect(
            await _listed(context, similar), [], "the runs with a tag that differs in its last character"
        )
    await context.store.set_tags(run_id, {key: None})
    context.expect(await _listed(context, {key: value}), [], "the runs with a removed tag")


@example("TAG-1")
async def tags_stay_with_their_run(context: CheckContext) -> None:
    """Ending, cancelling and reopening a run keep its tags; a run derived from it has none of them."""
    store, own = context.store, f"{new_id(context)}"
    run_id = await start(context, tags={"env": own})
    await run_step(context, run_id, status=StepStatus.FAILED)
    await store.request_cancel(run_id)
    for done in ("complete_run", "retry_step"):
        if done == "complete_run":
            await store.complete_run(run_id, RunStatus.FAILED)
        else:
            await store.retry_step(run_id, "charge")
        context.expect(await _tags(context, run_id), (("env", own),), f"the tags after {done}")
        context.expect(await _listed(context, {"env": own}), [run_id], f"the runs with the tag after {done}")
    derived = await start(context, source_run_id=run_id)
    context.expect(await _tags(context, derived), (), "the tags of a derived run")
    if Capability.DASHBOARD in context.capabilities:
        found = (await store.get_runs_page(search=own)).total_count
        context.expect(found, 0, "the runs that a search for the value of a tag finds")


@example("TAG-1", needs=[Capability.TRIGGER])
async def a_trigger_of_an_existing_run_ignores_tags(context: CheckContext) -> None:
    """With created=False the run keeps its tags; a run under a registered id gets those of the call."""
    store, run_id, never = context.store, new_id(context), new_id(context)
    first, second = (f"{new_id(context)}" for _ in range(2))

    async def trigger(key: UUID, tags: dict[str, str]) -> TriggerResult:
        return await store.trigger_run(
            FLOW, "orders", new_id(context), "m", tags=tags, idempotency_key=f"key of {key}"
        )

    for tags in ({"env": first}, {"env": second, "more": second}):
        result = await trigger(run_id, tags)
        context.expect(result.created, tags == {"env": first}, "whether a trigger started the run of its key")
        context.expect(result.run.tags, (("env", first),), "the tags in the result of a trigger")
    context.expect(await _listed(context, {"env": second}), [], "the runs with tags that were ignored")
    await store.try_register_idempotency_key(FLOW, "m", f"key of {never}", never)
    result = await trigger(never, {"env": second})
    expect_fields(context, result.run, "the run of a registered key", run_id=never, tags=(("env", second),))
    context.expect(
        await _listed(context, {"env": second}), [never], "the runs with the tag of a registered run"
    )


@example("TAG-1", needs=[Capability.VIRTUAL_CLOCK])
async def tags_are_deleted_with_their_run(context: CheckContext) -> None:
    """After cleanup and delete_run no list has the run, and a new run with its id has only its own tags."""
    store, own = context.store, f"{new_id(context)}"
    deletions = ["cleanup"]
    if Capability.DELETION in context.capabilities:
        deletions.append("delete_run")
    for deletion in deletions:
        run_id = await start(context, tags={"env": own, "old": own})
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        if deletion == "cleanup":
            advance(context, DAY)
            await store.cleanup(now(context))
        else:
            await store.delete_run(run_id)
        context.expect(
            await _listed(context, {"env": own}), [], f"the runs with the tag of a run after {deletion}"
        )
        await start(context, run_id=run_id)
        context.expect(
            await _tags(context, run_id), (), f"the tags of a run with the id of one before {deletion}"
        )
        context.expect(await _listed(context, {"env": own}), [], "the runs with a tag of an earlier run")
        await store.set_tags(run_id, {"env": own})
        context.expect(await _listed(context, {"env": own}), [run_id], "the runs with a tag set again")
        await store.set_tags(run_id, {"env": None})


@example("TAG-2")
async def set_tags_merges(context: CheckContext) -> None:
    """A key with a value is added or replaced, one with None removed, the others stay; any status."""
    store, other, own = context.store, await second_store(context), f"{new_id(context)}"
    for status in (None, *TERMINAL_RUN_STATUSES):
        run_id = await start(context, tags={"a": own, "b": "1", "c": "1"})
        if status is not None:
            await store.complete_run(run_id, status)
        before = await observe(context, run_id)
        changes = {"b": "2", "c": None, "d": "3", "no such key": None}
        for _ in range(2):
            answer: Any = await outcome_of(other.set_tags(run_id, changes))
            context.expect(answer, None, "the result of set_tags")
            wanted = (("a", own), ("b", "2"), ("d", "3"))
            context.expect(await _tags(context, run_id), wanted, "the tags after set_tags")
        for tags, found in (
            ({"a": own, "b": "2", "d": "3"}, [run_id]),
            ({"a": own, "b": "1"}, []),
            ({"a": own, "c": "1"}, []),
        ):
            context.expect(await _listed(context, tags), found, f"the runs with {tags} after set_tags")
        await store.set_tags(run_id, {})
        context.expect(await _tags(context, run_id), wanted, "the tags after an empty set_tags")
        await store.set_tags(run_id, {"a": own, "b": "1", "c": "1", "d": None})
        after = await observe(context, run_id)
        assert_same(context, after, before, "set_tags changes nothing but the tags")
        await store.set_tags(run_id, dict.fromkeys("abc"))
        context.expect(await _tags(context, run_id), (), "the tags after all were removed")
        context.expect(await _listed(context, {"a": own}), [], "the runs with a removed tag")


@example("TAG-2")
async def a_run_has_at_most_32_tags(context: CheckContext) -> None:
    """What counts is the result: 33 tags are refused and change nothing, 32 can be replaced by 32 others."""
    store, own = context.store, f"{new_id(context)}"
    tags = {f"old {number}": own for number in range(LIMIT - 1)}
    run_id = await start(context, tags=tags)
    await store.set_tags(run_id, {"last": own})
    full = await _tags(context, run_id)
    context.expect(len(full), LIMIT, "the number of tags after set_tags up to the limit")
    too_many: tuple[dict[str, str | None], ...] = (
        {"new": own},
        {"old 0": "changed", "new": own},
        {"old 0": None, "new": own, "newer": own},
        {f"new {number}": own for number in range(LIMIT)},
    )
    for changes in too_many:
        sentence = "set_tags that would leave 33 or more tags"
        error = await context.expect_error(store.set_tags(run_id, changes), ConflictError, sentence)
        expect_fields(context, error, f"the error of {sentence}", run_id=run_id, step_key=None)
        context.expect(await _tags(context, run_id), full, f"the tags after {sentence}")
    context.expect(await _listed(context, {"new": own}), [], "the runs with a tag that was refused")
    await store.set_tags(run_id, {"old 0": None, "new": own})
    context.expect(len(await _tags(context, run_id)), LIMIT, "the number of tags after one replaced another")
    removed = dict.fromkeys(key for key, _ in await _tags(context, run_id))
    changed = {f"new {number}": own for number in range(LIMIT)}
    await store.set_tags(run_id, {**removed, **changed})
    context.expect(dict(await _tags(context, run_id)), changed, "the tags after all were replaced by others")


@check("TAG-2", "CON-1", kind=Kind.RACE, isolated=False)
async def concurrent_changes_of_tags_all_take_effect(context: CheckContext) -> None:
    """Of calls that together would pass the limit as many succeed as fit, each whole; no change is lost."""
    stores = (context.store, await second_store(context))
    for _ in range(context.profile.of(4, 12, 60)):
        run_id = await start(context)
        calls = [{f"{number} {one}": f"{new_id(context)}" for one in range(6)} for number in range(8)]
        outcomes = await asyncio.gather(
            *(outcome_of(stores[n % 2].set_tags(run_id, tags)) for n, tags in enumerate(calls))
        )
        done = [tags for tags, outcome in zip(calls, outcomes, strict=True) if outcome is None]
        refused = sum(outcome == f"<{ConflictError.__name__} raised>" for outcome in outcomes)
        counts = (len(done), refused)
        context.expect(counts, (5, 3), "the calls that set 6 tags each: how many succeeded and were refused")
        wanted = {key: value for tags in done for key, value in tags.items()}
        context.expect(dict(await _tags(context, run_id)), wanted, "the tags after concurrent changes")
        for tags in done:
            context.expect(
                await _listed(context, tags), [run_id], "the runs with the tags of one of the calls"
            )


@example("TAG-3")
async def runs_with_all_tags_are_listed(context: CheckContext) -> None:
    """A list has exactly the runs with every tag, in the order of QRY-1, with each other filter."""
    store, own, flows = context.store, f"{new_id(context)}", (FLOW, new_id(context))
    for number in range(24):
        # Some start at the same time, some in the order of their ids.
        advance(context, SECOND if number % 3 else TICK)
        tags = {"own": own, "even": f"{number % 2 == 0}", "third": f"{number % 3}"}
        tags |= {"rare": own} if number in (5, 17) else {}
        run_id = await start(
            context, flow_id=flows[number % 4 == 0], flow_name=f"orders {number % 5}", tags=tags
        )
        if number % 4 == 1:
            await store.complete_run(run_id, TERMINAL_RUN_STATUSES[number % 3])
    runs = await store.get_runs(tags={"own": own}, take=context.page_size)
    context.expect(len(runs), 24, "the number of runs with a tag that all have")
    stored = [run for run in await store.get_runs(take=context.page_size) if ("own", own) in run.tags]
    context.expect(runs, tuple(stored), "the runs with a tag, compared with the list of all runs")
    filters: tuple[dict[str, str], ...] = (
        {"even": "True"},
        {"even": "True", "third": "2"},
        {"third": "2", "even": "True"},
        {"rare": own},
        {"rare": own, "even": "False"},
        {"even": "False", "rare": own},
        {"rare": own, "even": "True"},
        {"even": "true"},
        {"no such key": own},
        {},
    )
    for tags in ({"own": own, **one} for one in filters):
        for flow in (None, *flows):
            of_flow = [run for run in runs if flow in (None, run.flow_id)]
            wanted = [run for run in of_flow if set(tags.items()) <= set(run.tags)]
            for skip, take in ((0, 50), (1, 2), (30, 5)):
                found = await store.get_runs(flow, tags=tags, skip=skip, take=take)
                sentence = f"get_runs(tags={tags}, skip={skip}, take={take})"
                context.expect(found, tuple(wanted[skip : skip + take]), sentence)
            for position in (run.position for run in runs[::9]):
                place = (position.started_at, position.run_id)
                behind = [run for run in wanted if (run.started_at, run.run_id) < place]
                found = await store.get_runs(flow, tags=tags, after=position, take=3)
                context.expect(found, tuple(behind[:3]), f"get_runs(tags={tags}) behind a position")
            if Capability.DASHBOARD in context.capabilities:
                await _expect_pages(context, flow, tags, wanted)


async def _expect_pages(
    context: CheckContext, flow: UUID | None, tags: Mapping[str, str], runs: Sequence[FlowRunRecord]
) -> None:
    """Compare pages by tag, status and search with those of some runs."""
    for status, search in (
        (None, None),
        (RunStatus.RUNNING, None),
        (RunStatus.FAILED, "orders 3"),
        (None, "orders 3"),
    ):
        wanted = [
            run for run in runs if status in (None, run.status) and (search or "orders") in run.flow_name
        ]
        page = await context.store.get_runs_page(
            flow, status=status, search=search, tags=tags, skip=1, take=3
        )
        sentence = f"get_runs_page(status={status}, search={search!r}, tags={tags})"
        context.expect(page.total_count, len(wanted), f"the total of {sentence}")
        context.expect(page.runs, tuple(wanted[1:4]), f"the runs of {sentence}")


@example("TAG-3")
async def pages_by_tag_follow_one_another(context: CheckContext) -> None:
    """Pages that begin after one another repeat and skip no run that has the tags throughout."""
    store, own = context.store, f"{new_id(context)}"
    runs = []
    for number in range(12):
        advance(context, TICK if number % 3 else SECOND)
        runs.append(await start(context, tags={"own": own, "kept": f"{number % 2}"}))
    wanted = [run for run in await store.get_runs(tags={"own": own}) if ("kept", "0") in run.tags]
    seen: list[FlowRunRecord] = []
    position = None
    for number in range(len(runs)):
        page = await store.get_runs(tags={"own": own, "kept": "0"}, after=position, take=2)
        if not page:
            break
        seen += page
        position = page[-1].position
        # The tags of other runs change, and one of the runs that were listed loses its tag.
        await store.set_tags(runs[-1 - 2 * number % len(runs)], {"own": own, "other": f"{number}"})
        await start(context, tags={"own": own, "kept": "0"})
        if number == 0:
            await store.set_tags(page[0].run_id, {"kept": None})
    ids = [run.run_id for run in wanted]
    found = [run.run_id for run in seen if run.run_id in ids]
    context.expect(found, ids, "the runs on all pages by tag")


@example("TAG-3")
async def lists_follow_every_change_at_once(context: CheckContext) -> None:
    """A run is in the lists of its tags as soon as set_tags returns, read through any store."""
    store, other, own = context.store, await second_store(context), f"{new_id(context)}"
    run_id = await start(context)
    values = [None, "1", "2", "1", None, "2"]
    for value in values:
        await store.set_tags(run_id, {own: value})
        for one in (store, other):
            for wanted in ("1", "2"):
                found = [run.run_id for run in await one.get_runs(tags={own: wanted})]
                context.expect(
                    found, [run_id] * (value == wanted), f"the runs with {wanted!r} after {value!r} was set"
                )
    advance(context, HOUR)
    await store.complete_run(run_id, RunStatus.FAILED)
    context.expect(
        await _listed(context, {own: "2"}), [run_id], "the runs with a tag after the end of the run"
    )
