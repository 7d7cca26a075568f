"""A run of three steps: ``python first_run.py redis://localhost``."""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID

from flowstore import RunStatus, StepStatus, new_run_id, open_store

FLOW = UUID(int=1)


async def main(url: str) -> None:
    run_id = new_run_id()
    async with open_store(url) as store:
        await store.start_run(FLOW, "orders", run_id, "manual")
        for step in ("charge", "pack", "ship"):
            assert await store.try_claim_step(run_id, step, owner="me")
            await store.record_step_start(run_id, step, "work")
            await store.record_step_complete(run_id, step, StepStatus.SUCCEEDED)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        found = await store.get_run_detail(run_id)
        assert found is not None
        print(f"{found.status}: {', '.join(step.step_key for step in found.steps)}")
        print("a crash of the server loses " + ("nothing" if "durable" in store.capabilities else "writes"))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
