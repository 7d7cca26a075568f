"""EVT-2: outputs of a run."""

from __future__ import annotations

import sys
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import SIMILAR_KEYS, second_store, start
from flowstore_conformance.context import CheckContext
from flowstore_core import RunStatus

TOP = chr(sys.maxunicode)


@example("EVT-2")
async def the_last_write_of_a_key_wins(context: CheckContext) -> None:
    """Saving an output replaces the previous one of that key, from any store; no other write does."""
    store, other_store = context.store, await second_store(context)
    run_id, other = await start(context), await start(context)
    for writer, reader, value in (
        (store, other_store, "1"),
        (other_store, store, '{"b": 1, "a": 1.0}'),
        (store, store, ""),
    ):
        await writer.save_output(run_id, "a", value)
        context.expect(await reader.get_output(run_id, "a"), value, "the output after its last write")
        context.expect(
            await reader.get_outputs(run_id), {"a": value}, "get_outputs after overwriting an output"
        )
    await store.save_output(other, "a", "another run's")
    context.expect(await store.get_output(run_id, "a"), "", "the output of the same key of another run")
    for key in ("A", "a ", "b"):
        context.expect(await store.get_output(run_id, key), None, f"the unsaved output {key!r}")


@example("EVT-2")
async def equal_outputs_are_independent(context: CheckContext) -> None:
    """Of several long outputs with the same value, replacing or deleting one leaves the others unchanged."""
    store, run_id, value = context.store, await start(context), "x" * 20_000
    await store.save_outputs(run_id, dict.fromkeys(("a", "b", "c"), value))
    await store.save_output(run_id, "a", "1")
    await store.delete_outputs(run_id, prefix="b")
    context.expect(await store.get_outputs(run_id), {"a": "1", "c": value}, "the outputs that are left")


@example("EVT-2")
async def outputs_belong_to_one_run_and_key(context: CheckContext) -> None:
    """get_outputs returns only the outputs of that run, ordered by key in code point order."""
    store, run_id, other = context.store, await start(context), await start(context)
    for key in SIMILAR_KEYS:
        await store.save_output(run_id, key, f"of {key}")
    await store.save_output(other, "another", "another run's")
    outputs = await store.get_outputs(run_id)
    wanted = [(key, f"of {key}") for key in sorted(SIMILAR_KEYS)]
    context.expect(list(outputs.items()), wanted, "get_outputs in the order of the keys")
    context.expect(await store.get_output(other, "key"), None, "an output of another run")


@example("EVT-2")
async def several_outputs_are_saved_at_once(context: CheckContext) -> None:
    """save_outputs overwrites and adds, keeps the other outputs, and saves every text unchanged."""
    store, other_store = context.store, await second_store(context)
    run_id, other = await start(context), await start(context)
    await store.save_output(run_id, "kept", "0")
    await store.save_output(run_id, "b", "old")
    given = {"b": "1", "a": '{"b": 1,  "a": "\\u0000 \\\\"}', " ": "", "\u00e9'\"": "\n\t\\"}
    await store.save_outputs(run_id, given)
    wanted = {"kept": "0", **given}
    found = await other_store.get_outputs(run_id)
    context.expect(list(found.items()), sorted(wanted.items()), "the outputs after save_outputs")
    await store.save_outputs(run_id, {})
    context.expect(await store.get_outputs(run_id), wanted, "the outputs after save_outputs of none")
    context.expect(await store.get_outputs(other), {}, "the outputs of another run")
    many = {f"n{number}": str(number) for number in range(1000)}
    await store.complete_run(run_id, RunStatus.FAILED)
    await store.save_outputs(run_id, many)
    context.expect(await store.get_outputs(run_id, prefix="n"), many, "1,000 outputs saved on a terminal run")


# A prefix, and the keys among KEYS that begin with it.
KEYS = (
    "a",
    "a%",
    "a/",
    "a/1",
    "a/10",
    "a/2",
    "a_b",
    "ab",
    "A/1",
    " a",
    "\u00e9",
    "e\u0301",
    "\ud7ff",
    "\ue000",
    TOP,
    TOP * 2,
)
PREFIXES = (
    "",
    "a",
    "a/",
    "a%",
    "a_",
    "A",
    "A/",
    " ",
    "e",
    "\u00e9",
    "\ud7ff",
    "\ue000",
    TOP,
    TOP * 2,
    "a/1" * 85,
    "z",
)


async def _start_with_outputs(context: CheckContext) -> UUID:
    run_id = await start(context)
    for key in context.random.sample(KEYS, len(KEYS)):
        await context.store.save_output(run_id, key, f"of {key}")
    return run_id


@example("EVT-2")
async def outputs_are_read_by_prefix_and_page(context: CheckContext) -> None:
    """A prefix matches exactly and by code point; pages that follow each other show every output once."""
    store, run_id = context.store, await _start_with_outputs(context)
    for prefix in PREFIXES:
        wanted = {key: f"of {key}" for key in sorted(KEYS) if key.startswith(prefix)}
        found = await store.get_outputs(run_id, prefix=prefix)
        context.expect(list(found.items()), list(wanted.items()), f"get_outputs(prefix={prefix!r})")
        for take in (1, 2, context.page_size):
            paged: dict[str, str] = {}
            after = None
            while page := await store.get_outputs(run_id, prefix=prefix, after=after, take=take):
                paged |= page
                after = list(page)[-1]
                context.expect_that(len(page) <= take, f"a page of get_outputs has at most {take} outputs")
            context.expect(paged, wanted, f"the pages of {take} of get_outputs(prefix={prefix!r})")
    for after in ("a", "a/0", "a/3", "0", TOP * 3):
        for prefix in ("", "a/"):
            keys = list(await store.get_outputs(run_id, prefix=prefix, after=after))
            wanted_keys = sorted(key for key in KEYS if key.startswith(prefix) and key > after)
            context.expect(keys, wanted_keys, f"get_outputs(prefix={prefix!r}, after={after!r})")
    context.expect(dict(await store.get_outputs(run_id, take=0)), {}, "get_outputs(take=0)")


@example("EVT-2")
async def outputs_are_deleted_by_prefix(context: CheckContext) -> None:
    """delete_outputs deletes exactly the outputs with the prefix, of this run only, and counts them."""
    store, other = context.store, await _start_with_outputs(context)
    for prefix in PREFIXES:
        run_id = await _start_with_outputs(context)
        kept = sorted(key for key in KEYS if not key.startswith(prefix))
        for count in (len(KEYS) - len(kept), 0):
            context.expect(
                await store.delete_outputs(run_id, prefix=prefix), count, f"delete_outputs(prefix={prefix!r})"
            )
            context.expect(
                list(await store.get_outputs(run_id)), kept, f"the outputs after delete_outputs({prefix!r})"
            )
    await store.delete_outputs(run_id, prefix="a")
    await store.complete_run(run_id, RunStatus.FAILED)
    await store.save_output(run_id, "a/1", "again")
    context.expect(await store.get_output(run_id, "a/1"), "again", "an output saved after its deletion")
    context.expect(await store.delete_outputs(run_id, prefix="a/"), 1, "delete_outputs on a terminal run")
    context.expect(list(await store.get_outputs(other)), sorted(KEYS), "the outputs of another run")
