"""EVT-2: outputs of a run."""

from __future__ import annotations

from uuid import uuid4

import pytest

from flowstore_core import Capability, FlowStore
from tests.conftest import OpenAnother
from tests.contract.scenes import new_run, together

pytestmark = pytest.mark.needs(Capability.OUTPUTS)


async def test_evt_2_an_output_comes_back_to_the_letter(store: FlowStore) -> None:
    run_id = await new_run(store)
    for key, value in (("a", ' {"b":1,\n"a": 1.0} '), ("empty", ""), ("null", "null")):
        await store.save_output(run_id, key, value)
        assert await store.get_output(run_id, key) == value


async def test_evt_2_the_last_write_wins(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    run_id = await new_run(store)
    await store.save_output(run_id, "a", "1")
    await other.save_output(run_id, "a", "2")
    assert await store.get_output(run_id, "a") == "2"
    await store.save_output(run_id, "a", "3")
    assert await other.get_outputs(run_id) == {"a": "3"}


async def test_evt_2_of_many_at_once_one_remains_whole(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another()]
    run_id = await new_run(store)
    await together(stores[n % 2].save_output(run_id, "a", f"value {n}") for n in range(16))
    assert await store.get_output(run_id, "a") in {f"value {n}" for n in range(16)}


async def test_evt_2_outputs_are_by_run_and_key(store: FlowStore) -> None:
    run_id, other = await new_run(store), await new_run(store)
    keys = ["b", "a", "A", "a ", "é"]
    for key in keys:
        await store.save_output(run_id, key, f"of {key}")
    await store.save_output(other, "a", "another run's")
    outputs = await store.get_outputs(run_id)
    assert list(outputs.items()) == [(key, f"of {key}") for key in sorted(keys)]
    assert await store.get_output(other, "b") is None


async def test_evt_2_what_was_not_saved_is_none(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.get_output(run_id, "a") is None
    assert await store.get_outputs(run_id) == {}
    assert await store.get_output(uuid4(), "a") is None
    assert await store.get_outputs(uuid4()) == {}
