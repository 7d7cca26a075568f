"""The waiting calls of a store."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from flowstore_core import StoreClosedError, StoreUnavailableError
from flowstore_core.backend import WaitingCalls


async def test_a_read_that_closing_interrupts_ends_the_call_with_store_closed_error() -> None:
    waiting, reading, closed = WaitingCalls(), asyncio.Event(), asyncio.Event()

    async def look() -> tuple[None, None]:
        reading.set()
        await closed.wait()
        raise StoreUnavailableError("the connection was closed")

    call = asyncio.create_task(waiting.wait(look, timedelta(hours=1)))
    await reading.wait()
    waiting.close()
    closed.set()
    with pytest.raises(StoreClosedError):
        await call


async def test_a_read_that_fails_while_the_store_is_open_ends_the_call_with_its_error() -> None:
    async def look() -> tuple[None, None]:
        raise StoreUnavailableError("the connection was lost")

    with pytest.raises(StoreUnavailableError, match="lost"):
        await WaitingCalls().wait(look, timedelta(hours=1))
