"""docs/document-toolkit.md: its code works, and its figures are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Awaitable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from flowstore_core import Capability, RunStatus, StepRequest, StepStatus, new_run_id
from flowstore_core.timeseries import LATEST
from flowstore_documents import DocumentStore, KeyValueSpace, SpaceLimits, capabilities_of
from flowstore_documents.memory_space import MemoryData
from flowstore_documents.space_checks import SPACE_CHECKS
from tests.documents_backend.stores import CountingSpace, open_on

PAGE = (Path(__file__).parents[1] / "docs" / "document-toolkit.md").read_text(encoding="utf-8")
FLOW = UUID(int=3)
HOUR = timedelta(hours=1)


def test_the_program_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (program,) = [block for block in blocks if "asyncio.run(main())" in block]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_the_test_of_a_space_passes(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (test,) = [block for block in blocks if "def test_" in block]
    (tmp_path / "test_space.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "test_space.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{len(SPACE_CHECKS)} passed" in done.stdout


def test_the_plugin_compiles() -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        compile(block, "document-toolkit.md", "exec")


def test_the_members_of_a_space_are_listed() -> None:
    rows = set(re.findall(r"^\| `(\w+)[(`]", PAGE, re.M))
    members = {name for name in vars(KeyValueSpace) if not name.startswith("_")}
    assert members <= rows


def test_the_limits_are_those_of_the_code() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGE, re.M))
    least = SpaceLimits()
    assert table == {field.name: f"{getattr(least, field.name):,}" for field in fields(SpaceLimits)}


def test_the_table_of_capabilities_is_correct() -> None:
    (listed,) = re.findall(r"^\| snapshots and watch \| ([A-Z_, ]+) \|", PAGE, re.M)
    assert capabilities_of(snapshots=True) == {Capability[name] for name in listed.split(", ")}
    assert capabilities_of(snapshots=True) - capabilities_of(snapshots=False) == {Capability.DASHBOARD}
    full = capabilities_of(snapshots=True)
    assert full - capabilities_of(snapshots=True, watch=False) == {Capability.WATCH}


async def test_the_costs_are_those_of_the_code() -> None:
    space = CountingSpace(MemoryData())
    measured: dict[str, tuple[int, ...]] = {}
    async with open_on(space) as store:

        async def measure(name: str, call: Awaitable[Any]) -> Any:
            space.reset()
            result = await call
            changes = [change for commit in space.commits for change in commit]
            measured[name] = (
                space.reads,
                len(space.commits),
                max((len(change.expected) for change in changes), default=0),
                max((len(change.puts) + len(change.deletes) for change in changes), default=0),
            )
            return result

        await _live(store, measure)
    table = {
        row[0]: tuple(map(int, row[1:]))
        for row in re.findall(r"^\| ([a-z][\w ,]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", PAGE, re.M)
    }
    assert table == measured, "\n".join(
        f"| {name} | {' | '.join(map(str, costs))} |" for name, costs in measured.items()
    )


async def _live(store: DocumentStore, measure: Any) -> None:
    """Measure the operations of a run of twelve steps."""
    run_id, other, keys = new_run_id(), new_run_id(), [f"step {number}" for number in range(10)]
    await measure("start_run", store.start_run(FLOW, "orders", other, "manual"))
    tags = {"customer": "acme", "env": "test"}
    await measure(
        "start_run with two tags", store.start_run(FLOW, "orders", new_run_id(), "manual", tags=tags)
    )
    await measure(
        "trigger_run with a key, a deadline and two dispatches",
        store.trigger_run(
            FLOW,
            "orders",
            run_id,
            "manual",
            idempotency_key="key",
            timeout_at=LATEST,
            dispatch=[StepRequest(step_key=key, step_type="http", queue="q") for key in keys[:2]],
        ),
    )
    for key in keys[2:]:
        await store.record_step_start(run_id, key, "http")
    await measure("try_claim_step", store.try_claim_step(run_id, "a", owner="me"))
    await measure("record_step_start", store.record_step_start(run_id, "a", "http", owner="me"))
    await measure("record_step_complete", store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED))
    await measure("try_record_dispatch", store.try_record_dispatch(run_id, "b", queue="q", step_type="http"))
    (claimed,) = await measure("claim_next_steps of one step", store.claim_next_steps(["q"], lease=HOUR))
    await measure(
        "renew_step_claim", store.renew_step_claim(run_id, claimed.step_key, claimed.owner, 2 * HOUR)
    )
    await measure(
        "advance_run with one dispatch",
        store.advance_run(
            run_id=run_id,
            step_key=claimed.step_key,
            status=StepStatus.SUCCEEDED,
            attempt=1,
            dispatch=[
                StepRequest(step_key="c", step_type="http", queue="q", after=(claimed.step_key, keys[2]))
            ],
            complete_as=RunStatus.SUCCEEDED,
        ),
    )
    await store.register_waiter(run_id, "c", "go")
    await measure("deliver_signal", store.deliver_signal(run_id, "go", "{}", delivery_id="1"))
    await measure(
        "deliver_signal that buffers",
        store.deliver_signal(run_id, "early", "{}", delivery_id="2", buffer=True),
    )
    await measure("register_waiter that takes a payload", store.register_waiter(run_id, "d", "early"))
    await measure("set_tags of one tag", store.set_tags(run_id, {"env": "test"}))
    await measure("save_output", store.save_output(run_id, "key", "{}"))
    await measure("append_event", store.append_event(run_id, "started"))
    await measure("get_run", store.get_run(run_id))
    await measure("get_run_detail", store.get_run_detail(run_id))
    await measure("get_runs with two tags", store.get_runs(tags=tags))
    await measure("export_run", store.export_run(run_id))
    await measure("complete_run", store.complete_run(other, RunStatus.SUCCEEDED))
    for key in keys[2:]:
        await store.record_step_complete(run_id, key, StepStatus.SUCCEEDED)
    for key in (keys[0], keys[1], "b", "c"):
        await store.release_dispatch(run_id, key)
    expected = await store.get_step_statuses(run_id)
    is_completed = await measure(
        "complete_run with expected", store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected)
    )
    assert is_completed
    await measure("retry_step of an ended run", store.retry_step(run_id, keys[2]))
    start = store.try_start_step(run_id, "new", "http", owner="me", lease=HOUR)
    await measure("try_start_step of a new step", start)
