"""The two public import roots: flowstore for engines, flowstore_core.backend for backends."""

from __future__ import annotations

import flowstore
import flowstore_core
from flowstore_core import backend
from flowstore_core.store import FlowStore

FOR_BACKENDS = {"Backend", "StoreConfig", "hookimpl", "hookspec"}


def test_flowstore_reexports_core_except_protocols_and_plugin_names() -> None:
    for name in flowstore.__all__:
        assert getattr(flowstore, name) is getattr(flowstore_core, name)
    others = set(flowstore_core.__all__) - set(flowstore.__all__)
    parts = {kind.__name__ for kind in FlowStore.__mro__} - {"FlowStore"}
    assert others >= FOR_BACKENDS
    assert others - FOR_BACKENDS <= parts


def test_the_backend_module_exports_the_names_for_backends() -> None:
    assert set(backend.__all__) >= FOR_BACKENDS
    assert all(hasattr(backend, name) for name in backend.__all__)
