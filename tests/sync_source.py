"""Generates flowstore_core/sync/store.py from the protocols.

``python -m tests.sync_source`` writes the file. Each operation gets the signature and the docstring that it
has in its protocol, and a body that passes its parameters on.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flowstore_core
from flowstore_core import FlowStore
from flowstore_core.operations import OPERATIONS

PATH = Path(flowstore_core.__file__).parent / "sync" / "store.py"

HEADER = '''\
"""The synchronous store: the operations of FlowStore as plain methods.

Generated from the protocols by ``python -m tests.sync_source``; do not edit.
"""

from __future__ import annotations
'''

CLASS = '''
class SyncFlowStore(SyncStoreBase):
    """Every operation of the contract, for code without an event loop; open_store_sync opens it.

    Any number of threads may use it. Each call blocks its thread until it has ended; calls of several threads
    run concurrently. A method whose capability the backend lacks raises NotSupportedError.
    """
'''


def generate() -> str:
    """The formatted source of the file."""
    operations = [getattr(FlowStore, name) for name in ("ping", *OPERATIONS)]
    imports = defaultdict[str, set[str]](set)
    imports["flowstore_core.sync.base"].add("SyncStoreBase")
    for operation in operations:
        for module, name in _imports(operation):
            imports[module].add(name)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in imports.items()]
    methods = [textwrap.indent(_method(operation), "    ") for operation in operations]
    return _format("\n".join([HEADER, *lines, CLASS, *methods]))


def _method(operation: Any) -> str:
    """The protocol's method without ``async``, with a body in place of its ``...``."""
    source = textwrap.dedent(inspect.getsource(operation))
    definition, ellipsis, rest = source.rpartition("    ...\n")
    assert definition.startswith("async def ")
    assert ellipsis
    assert not rest
    arguments = [
        f"{parameter.name}={parameter.name}" if parameter.kind is parameter.KEYWORD_ONLY else parameter.name
        for parameter in list(inspect.signature(operation).parameters.values())[1:]
    ]
    call = ", ".join([f"self._store.{operation.__name__}", *arguments])
    return f"{definition.removeprefix('async ')}    return self._thread.call({call})\n"


def _imports(operation: Any) -> Iterator[tuple[str, str]]:
    """Module and name of every type in the annotations, and of every default that is not a literal."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(operation))).body
    assert isinstance(function, ast.AsyncFunctionDef)
    function.body = []
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in operation.__globals__:
            value = operation.__globals__[node.id]
            yield value.__module__, node.id


def _format(source: str) -> str:
    # Ruff wraps no docstrings, and those of the protocols are as wide as these.
    for command in (["check", "--select", "I,F401", "--fix"], ["format"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(PATH), "-"],
            input=source,
            capture_output=True,
            text=True,
            check=True,
        )
        source = done.stdout
    return source


if __name__ == "__main__":
    PATH.write_text(generate(), encoding="utf-8")
