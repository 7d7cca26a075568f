"""The promises of ``KeyValueSpace``, on which the store relies: one test for each check."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from flowstore_documents.memory_space import MemoryData
from flowstore_documents.space_checks import SPACE_CHECKS, OpenSpace, SpaceCheck

from flowstore_yourdb.space import YourdbSpace


def space_opener() -> OpenSpace:
    """Opens clients of the same data, empty at first: in your database, of a new prefix."""
    data = MemoryData()

    @asynccontextmanager
    async def open_space() -> AsyncIterator[YourdbSpace]:
        space = YourdbSpace(data)
        try:
            yield space
        finally:
            await space.aclose()

    return open_space


@pytest.mark.parametrize("check", SPACE_CHECKS, ids=lambda check: check.__name__)
def test_the_space(check: SpaceCheck) -> None:
    asyncio.run(check(space_opener()))
