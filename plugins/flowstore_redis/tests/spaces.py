"""Spaces, and a few requests to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from flowstore_redis.settings import read_settings
from flowstore_redis.space import RedisSpace

from flowstore_core import StoreConfig
from flowstore_core.urls import parse_url
from flowstore_documents import Change, KeyValueSpace, Range, Version


@asynccontextmanager
async def space_at(url: str, **options: object) -> AsyncIterator[RedisSpace]:
    parts = parse_url(url)
    config = StoreConfig(
        url=url, scheme=parts.scheme, options={**parts.options, **options}, clock=None, migrate=True
    )
    space = RedisSpace(read_settings(config))
    try:
        yield space
    finally:
        await space.aclose()


async def put(space: KeyValueSpace, **values: str) -> Version:
    puts = {key.encode(): value.encode() for key, value in values.items()}
    (version,) = await space.commit([Change(puts=puts)])
    assert version is not None
    return version


async def names(space: KeyValueSpace) -> Sequence[bytes]:
    page = (await space.read((), [Range(b"", b"\xff")])).pages[0]
    return [key for key, _ in page.items]
