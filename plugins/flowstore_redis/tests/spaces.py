"""Spaces of their own for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flowstore_redis.settings import read_settings
from flowstore_redis.space import RedisSpace

from flowstore_core import StoreConfig
from flowstore_core.urls import parse_url


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
