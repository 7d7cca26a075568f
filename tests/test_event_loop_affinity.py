"""A store belongs to one event loop of one process and refuses calls from others."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check, all_checks
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check

from flowstore_core import ConfigurationError, FlowStore, StoreClosedError, open_store, validated_store
from flowstore_core.plugins import find_backend
from tests.calls import new_run

NEVER_CLOSED = """
import asyncio, sys
from flowstore_core import open_store

opened = []

async def main():
    opened.append(open_store(sys.argv[1]))
    store = await opened[0].__aenter__()
    await store.get_runs()

asyncio.run(main())
"""


async def test_calls_from_another_thread_are_refused(namespace: str) -> None:
    async with open_store(namespace) as store:
        for operation in (store.get_runs, store.ping, store.aclose, store.get_statistics):
            with pytest.raises(ConfigurationError, match="event loop"):
                await asyncio.to_thread(lambda call=operation: asyncio.run(call()))
        run_id = await new_run(store)
        assert await store.try_claim_step(run_id, "a")
    with pytest.raises(StoreClosedError):
        await asyncio.to_thread(lambda: asyncio.run(store.get_runs()))


async def test_a_nested_event_loop_is_refused(namespace: str, backend: str) -> None:
    result = await run_check(_nested(), namespace, find_backend(backend)[1], Profile.QUICK, 1)
    assert result.status is Status.PASS, result.failure


async def test_the_suite_finds_a_store_bound_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(validated_store, "running_loop", lambda: loop)
    result = await run_check(_nested(), "memory://", find_backend("memory")[1], Profile.QUICK, 1)
    assert result.failure is not None
    assert "expected ConfigurationError, got no error" in result.failure.message


def _nested() -> Check:
    name = "a_nested_event_loop_is_refused"
    return next(check for check in all_checks() if check.name == name)


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{folder}/flows.db"])
def test_a_later_loop_of_the_same_thread_is_refused(url: str, tmp_path: Path) -> None:
    opened = open_store(url.replace("{folder}", str(tmp_path)))
    with asyncio.Runner() as runner:
        store = runner.run(opened.__aenter__())
        for operation in (store.get_runs, store.ping, store.aclose):
            with pytest.raises(ConfigurationError, match="event loop"), asyncio.Runner() as later:
                later.run(operation())
        assert runner.run(store.get_runs()) == ()
        runner.run(opened.__aexit__(None, None, None))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
async def test_a_forked_process_is_refused_and_does_not_close_the_store(namespace: str) -> None:
    async with open_store(namespace) as store:
        run_id = await new_run(store)
        claiming = [asyncio.ensure_future(store.try_claim_step(run_id, f"step {n}")) for n in range(5)]
        await asyncio.sleep(0)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(writing, json.dumps(_errors_in_child(store)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        await asyncio.to_thread(os.waitpid, child, 0)
        errors = json.loads(os.read(reading, 10_000))
        os.close(reading)
        assert errors == ["ConfigurationError", "ConfigurationError", None, "ConfigurationError"]
        assert all(await asyncio.gather(*claiming))
        assert len(await store.get_step_claims(run_id)) == 5


def _errors_in_child(store: FlowStore) -> list[str | None]:
    errors: list[str | None] = []
    for operation in (store.get_runs, store.ping, store.aclose, store.get_active_runs):
        try:
            asyncio.run(asyncio.wait_for(operation(), 10))  # type: ignore[operator]
            errors.append(None)
        except Exception as error:  # noqa: BLE001 - reported to the parent
            errors.append(type(error).__name__)
    return errors


async def test_a_program_that_does_not_close_its_store_prints_nothing(namespace: str) -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NEVER_CLOSED, namespace, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, stderr = await asyncio.wait_for(program.communicate(), 60)
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert (program.returncode, stderr) == (0, b"")
