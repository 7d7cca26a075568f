"""EVT-2: outputs of a run."""

from __future__ import annotations

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import SIMILAR_KEYS, second_store, start
from flowstore_conformance.context import CheckContext


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
