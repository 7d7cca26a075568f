"""What each operation touches if the tables of a store are sharded by run, as docs/scaling.md says."""

from __future__ import annotations

import pytest

from flowstore_core.operations import OPERATIONS
from tests import sharding


@pytest.mark.timeout(300)
async def test_the_page_says_what_each_operation_touches() -> None:
    table = sharding.render(await sharding.simulate())
    assert table == sharding.split(sharding.PAGE.read_text(encoding="utf-8"))[1]


def test_every_operation_is_called() -> None:
    called = {sharding.operation_of(name) for name in sharding.ALL_CALLS}
    assert called == {name for name, one in OPERATIONS.items() if not one.is_hint}
