"""trigger_run with an idempotency key on PostgreSQL: its fast path and its slow path (IDM-3)."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from flowstore_chaos.proxy import Fault, proxy_before
from flowstore_core import RunAlreadyExistsError, open_store
from tests.calls import FLOW
from tests.source_mutants.postgres_setup import connection, wait_until_blocked


async def test_trigger_run_with_a_key_is_one_round_trip(fresh: str) -> None:
    async with proxy_before(fresh) as (proxy, through), open_store(through, pool_size=1) as store:

        async def trigger(number: int) -> tuple[bool, int]:
            proxy.arm(0, Fault.REPLY_LOST)
            result = await store.trigger_run(
                FLOW, "orders", UUID(int=number), "t", idempotency_key=f"{number}"
            )
            return result.created, proxy.messages

        # The first calls prepare the statement.
        await trigger(1)
        await trigger(2)
        assert await trigger(3) == (True, 1)
        assert await trigger(3) == (False, 1)


@pytest.mark.parametrize("commits", [True, False])
async def test_idm_3_a_run_that_is_stored_at_the_same_time(commits: bool, fresh: str) -> None:
    """Another call inserts the run while the trigger has registered its key."""
    async with open_store(fresh) as store, connection(fresh) as other:
        run_id = uuid4()
        transaction = other.transaction()
        await transaction.start()
        await other.execute(
            "INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, start_token) "
            "VALUES ($1, $2, 'orders', 'Running', 'manual', now(), gen_random_uuid())",
            run_id,
            FLOW,
        )
        triggering = asyncio.ensure_future(
            store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="k")
        )
        await wait_until_blocked(fresh, other, triggering)
        if commits:
            await transaction.commit()
            with pytest.raises(RunAlreadyExistsError):
                await triggering
        else:
            await transaction.rollback()
            assert (await triggering).created
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert found == (None if commits else run_id)
