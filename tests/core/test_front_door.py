"""The two public import roots: flowstore for engines, flowstore_core.backend for backends."""

from __future__ import annotations

import flowstore
import flowstore_core
from flowstore_core import backend
from flowstore_core.store import FlowStore

FOR_BACKENDS = {"Backend", "StoreConfig", "hookimpl", "hookspec"}


def test_flowstore_re_exports_core_except_for_protocols_and_plugins() -> None:
    for name in flowstore.__all__:
        assert getattr(flowstore, name) is getattr(flowstore_core, name)
    rest = set(flowstore_core.__all__) - set(flowstore.__all__)
    parts = {kind.__name__ for kind in FlowStore.__mro__} - {"FlowStore"}
    assert rest >= FOR_BACKENDS
    assert rest - FOR_BACKENDS <= parts


def test_the_sdk_exports_everything_that_core_has_for_backends() -> None:
    assert set(backend.__all__) >= FOR_BACKENDS
    assert all(hasattr(backend, name) for name in backend.__all__)
