"""Plugins: found by entry point, rejected by name, and independent of each other."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import Any
from uuid import uuid4

import pytest

from flowstore_core import (
    BackendLoadError,
    Capability,
    ConfigurationError,
    FlowStore,
    NotSupportedError,
    UnknownBackendError,
    open_store,
)
from flowstore_core.plugins import find_backend, load_plugins
from tests.calls import new_run
from tests.core.conftest import RECORDING, Install
from tests.virtual_clock import VirtualClock


async def _open(url: str, **options: Any) -> None:
    async with open_store(url, **options):
        pass


def _wrapper(name: str) -> str:
    return f"""
    import flowstore_core as fs

    class Wrapper:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, operation):
            async def call(**arguments):
                return f"{name}(" + await getattr(self._store, operation)(**arguments) + ")"
            return call

    @fs.hookimpl
    def flowstore_wrap_store(store, config):
        return Wrapper(store) if config.scheme == "mine" else None
    """


def test_plugins_built_in_backends_are_found_by_their_entry_points() -> None:
    found = {plugin.name: plugin for plugin in load_plugins()}
    assert {"memory", "postgresql", "sqlite"} <= set(found)
    for name in ("memory", "postgresql", "sqlite"):
        assert found[name].error is None
        assert [backend.name for backend in found[name].backends] == [name]
        assert found[name].distribution == "flowstore"
    names = {entry.name for entry in entry_points(group="flowstore") if entry.value.startswith("flowstore_")}
    # One entry point per scheme, so that opening a URL imports one plugin.
    assert names == {
        scheme
        for name in ("memory", "postgresql", "sqlite")
        for b in found[name].backends
        for scheme in b.schemes
    }


async def test_plugins_an_installed_backend_is_opened_by_its_scheme(install: Install) -> None:
    with pytest.raises(UnknownBackendError):
        await _open("mine://x")
    install("mine", RECORDING)
    async with open_store("mine://x?colour=red") as store:
        assert store.backend == "mine"
        assert store.capabilities == frozenset(Capability)
        assert await store.get_run_status(uuid4()) == "get_run_status of innermost"
    (config,) = importlib.import_module("plugin_of_mine").opened
    assert (config.url, config.scheme, dict(config.options)) == (
        "mine://x?colour=red",
        "mine",
        {"colour": "red"},
    )


async def test_plugins_the_error_of_an_unknown_scheme_lists_the_installed_ones() -> None:
    with pytest.raises(UnknownBackendError) as caught:
        await _open("nobody://x")
    assert caught.value.scheme == "nobody"
    assert isinstance(caught.value, ConfigurationError)
    for known in ("nobody", "memory", "sqlite", "postgresql"):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('broken')",
        "this is not Python",
        "import plugin_of_mine.part",
        "from flowstore_core import nothing_of_this_name",
        "import flowstore_core as fs\n@fs.hookimpl\ndef flowstore_backends():\n    raise KeyError('x')",
        "import flowstore_core as fs\n@fs.hookimpl\ndef flowstore_backends():\n    return 5",
        "import flowstore_core as fs\n@fs.hookimpl\ndef flowstore_backend():\n    return []",
        "import flowstore_core as fs\n@fs.hookimpl\ndef flowstore_backends(extra):\n    return []",
    ],
)
async def test_plugins_a_broken_plugin_is_named_and_disables_no_other(install: Install, code: str) -> None:
    install("mine", code)
    install("sound", RECORDING.replace("mine", "sound"))
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert caught.value.plugin == "mine"
    assert "mine" in str(caught.value)
    assert "dist-of-mine" in caught.value.remedy
    assert caught.value.__cause__ is not None
    await _open("memory://")
    await _open("sound://")
    # The error for an unknown scheme names the broken plugin.
    with pytest.raises(UnknownBackendError, match="'mine'"):
        await _open("nobody://x")


@pytest.mark.parametrize(
    ("requires", "remedy"),
    [
        ((), "pip install nosuchdriver"),
        (("nosuchdriver>=1",), "pip install nosuchdriver"),
        (
            ("other; extra == 'fast'", "NoSuchDriver>=1; extra == 'driver'"),
            "pip install 'dist-of-mine[driver]'",
        ),
    ],
)
async def test_plugins_report_a_missing_driver_with_its_remedy(
    install: Install, requires: tuple[str, ...], remedy: str
) -> None:
    install("mine", "import nosuchdriver.part\n" + RECORDING, requires=requires)
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert caught.value.plugin == "mine"
    assert caught.value.remedy == remedy
    assert "nosuchdriver" in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("requires", "remedy"),
    [
        (("flowstore[documents]",), "pip install 'flowstore[documents]'"),
        (("flowstore", "msgspec>=1"), "pip install msgspec"),
        (("flowstore", "msgspec>=1; extra == 'fast'"), "pip install 'dist-of-mine[fast]'"),
    ],
)
async def test_plugins_name_the_extra_of_flowstore_with_a_missing_module(
    install: Install, requires: tuple[str, ...], remedy: str
) -> None:
    install("mine", "raise ModuleNotFoundError(name='msgspec')\n" + RECORDING, requires=requires)
    with pytest.raises(BackendLoadError, match="module 'msgspec' is not installed") as caught:
        await _open("mine://x")
    assert caught.value.remedy == remedy


async def test_plugins_report_a_driver_missing_at_open_with_its_remedy(install: Install) -> None:
    install("mine", RECORDING.replace("opened.append(config)", "import nosuchdriver"))
    assert find_backend("mine")[1].name == "mine"
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert caught.value.remedy == "pip install nosuchdriver"


async def test_plugins_a_missing_module_of_the_plugin_is_not_a_missing_driver(install: Install) -> None:
    install("mine", RECORDING.replace("opened.append(config)", "import plugin_of_mine.part"))
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert "pip install" not in str(caught.value)


async def test_plugins_two_plugins_with_one_scheme_are_refused_and_named(install: Install) -> None:
    both = "frozenset({'mine', 'unique-NAME'})"
    for name in ("first", "second"):
        install(name, RECORDING.replace('frozenset({"mine"})', both.replace("NAME", name)))
    with pytest.raises(UnknownBackendError) as caught:
        await _open("mine://x")
    for name in ("first", "second", "dist-of-first", "dist-of-second"):
        assert name in str(caught.value)
    # A scheme that only one of them serves works.
    await _open("unique-first://x")
    await _open("unique-second://x")


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ('name = "mine"', "name = 5"),
        ('name = "mine"', ""),
        ('schemes = frozenset({"mine"})', 'schemes = {"mine"}'),
        ('schemes = frozenset({"mine"})', 'schemes = "mine"'),
        ('schemes = frozenset({"mine"})', "schemes = frozenset({1})"),
        ('schemes = frozenset({"mine"})', 'schemes = frozenset({"Mine"})'),
        ('schemes = frozenset({"mine"})', 'schemes = frozenset({"mine://"})'),
        ('schemes = frozenset({"mine"})', 'schemes = frozenset({""})'),
        ('schemes = frozenset({"mine"})', 'schemes = frozenset({"1mine"})'),
        ("capabilities = frozenset(fs.Capability)", 'capabilities = frozenset({"flying"})'),
        ("capabilities = frozenset(fs.Capability)", "capabilities = list(fs.Capability)"),
        ("capabilities = frozenset(fs.Capability)", ""),
        ('options = frozenset({"colour"})', 'options = ["colour"]'),
        ('options = frozenset({"colour"})', ""),
        ("max_skew = timedelta(seconds=1)", ""),
        ("max_skew = timedelta(seconds=1)", "max_skew = 1"),
        ("max_skew = timedelta(seconds=1)", "max_skew = timedelta(seconds=-1)"),
        ("contract_version = 1", "contract_version = 1\n    limits = {}"),
        ("contract_version = 1", "contract_version = 2"),
        ("contract_version = 1", 'contract_version = "1"'),
        ("contract_version = 1", ""),
        ("async def open(", "async def opened("),
        ("async def scratch(", "async def scratched("),
    ],
)
async def test_plugins_a_bad_descriptor_is_refused(install: Install, line: str, bad: str) -> None:
    assert line in RECORDING
    install("mine", RECORDING.replace(line, bad))
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert caught.value.plugin == "mine"
    await _open("memory://")


async def test_plugins_capabilities_may_be_plain_str(install: Install) -> None:
    install("mine", RECORDING.replace("frozenset(fs.Capability)", 'frozenset({"leases", "durable"})'))
    async with open_store("mine://x") as store:
        assert Capability.LEASES in store.capabilities
        assert Capability.TRIGGER not in store.capabilities


async def test_plugins_a_store_without_a_declared_capability_is_rejected_and_closed(install: Install) -> None:
    code = RECORDING.replace(
        'if operation.startswith("_")', 'if operation == "renew_step_claim" or operation.startswith("_")'
    )
    install("mine", code)
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert "leases" in str(caught.value)
    assert "renew_step_claim" in str(caught.value)
    assert len(importlib.import_module("plugin_of_mine").closed) == 1


async def test_plugins_the_capabilities_of_a_store_may_depend_on_the_url(install: Install) -> None:
    code = RECORDING.replace(
        "    async def ping", "    capabilities = frozenset({fs.Capability.EVENTS})\n\n    async def ping"
    )
    install("mine", code)
    async with open_store("mine://x") as store:
        assert store.capabilities == {Capability.EVENTS}
        result: Any = await store.append_event(uuid4(), "event")
        assert result == "append_event of innermost"
        with pytest.raises(NotSupportedError):
            await store.get_outputs(uuid4())


async def test_plugins_a_clock_needs_the_virtual_clock_capability(install: Install) -> None:
    install("mine", RECORDING.replace("frozenset(fs.Capability)", "frozenset({fs.Capability.EVENTS})"))
    with pytest.raises(NotSupportedError) as caught:
        await _open("mine://x", clock=VirtualClock())
    assert (caught.value.backend, caught.value.capability) == ("mine", "virtual_clock")
    assert len(importlib.import_module("plugin_of_mine").closed) == 1
    await _open("mine://x")


def _install_wrapper(install: Install, name: str, code: str) -> None:
    install(name, code, entries=f"[flowstore_wrappers]\n{name} = plugin_of_{name}\n")


async def test_plugins_wrappers_are_applied_in_the_order_of_their_names(install: Install) -> None:
    _install_wrapper(install, "zulu", _wrapper("zulu"))
    install("mine", RECORDING)
    _install_wrapper(install, "alpha", _wrapper("alpha"))
    async with open_store("mine://x") as store:
        # The first is innermost, the last outermost.
        result = await store.get_run_status(uuid4())
    assert result == "zulu(alpha(get_run_status of innermost))"


async def test_plugins_a_wrapper_in_a_backend_plugin_wraps_only_that_backend(install: Install) -> None:
    own = dedent(_wrapper("own")).replace('config.scheme == "mine"', "True")
    install("mine", RECORDING + own)
    install("other", RECORDING.replace('"mine"', '"other"').replace("mine", "other"))
    _install_wrapper(install, "alpha", _wrapper("alpha").replace('config.scheme == "mine"', "True"))
    for scheme, expected in (
        ("mine", "alpha(own(get_run_status of innermost))"),
        ("other", "alpha(get_run_status of innermost)"),
    ):
        async with open_store(f"{scheme}://x") as store:
            assert await store.get_run_status(uuid4()) == expected


async def test_plugins_a_plugin_in_both_groups_wraps_a_store_once(install: Install) -> None:
    own = dedent(_wrapper("own")).replace('config.scheme == "mine"', "True")
    install(
        "mine",
        RECORDING + own,
        entries="[flowstore]\nmine = plugin_of_mine\n[flowstore_wrappers]\nmine = plugin_of_mine\n",
    )
    install("other", RECORDING.replace('"mine"', '"other"').replace("mine", "other"))
    for scheme in ("mine", "other"):
        async with open_store(f"{scheme}://x") as store:
            assert await store.get_run_status(uuid4()) == "own(get_run_status of innermost)"


async def test_plugins_a_wrapper_may_return_none(install: Install) -> None:
    _install_wrapper(install, "alpha", _wrapper("alpha"))
    async with open_store("memory://") as store:
        run_id = await new_run(store)
        assert await store.get_run_status(run_id) == "Running"


async def test_plugins_a_wrapper_that_fails_closes_the_store(install: Install) -> None:
    install("mine", RECORDING)
    _install_wrapper(install, "alpha", _wrapper("alpha").replace("return Wrapper(store)", "return 1 / 0"))
    with pytest.raises(ZeroDivisionError):
        await _open("mine://x")
    assert len(importlib.import_module("plugin_of_mine").closed) == 1


async def test_plugins_a_broken_wrapper_prevents_opening_any_store(install: Install) -> None:
    # Skipping a wrapper that encrypts would leak data.
    install("mine", RECORDING)
    _install_wrapper(install, "alpha", "raise RuntimeError('broken')")
    with pytest.raises(BackendLoadError) as caught:
        await _open("mine://x")
    assert caught.value.plugin == "alpha"
    assert len(importlib.import_module("plugin_of_mine").closed) == 1


_OPEN = """
import asyncio
import sys

from flowstore_core import FlowStoreError, open_store


async def use(url):
    try:
        async with open_store(url) as store:
            await store.get_runs()
    except FlowStoreError as error:
        print(type(error).__name__)


asyncio.run(use(sys.argv[1]))
print(*sorted(sys.modules))
"""


def _imported_for(url: str) -> set[str]:
    """Return the modules imported by a new process that opens a store."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", _OPEN, url], env=environment, capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("memory://", {"flowstore_memory"}),
        ("sqlite:///{folder}/x.db", {"flowstore_sqlite", "aiosqlite", "sqlite3"}),
        # No server listens on this port: the plugin is imported and the driver fails to connect.
        ("postgresql://nobody@127.0.0.1:9/x?retry_timeout=0.1", {"flowstore_postgres", "asyncpg"}),
        ("postgres://nobody@127.0.0.1:9/x?retry_timeout=0.1", {"flowstore_postgres", "asyncpg"}),
        ("mine://x", {"plugin_of_mine"}),
    ],
)
def test_plugins_only_the_plugin_of_the_scheme_is_imported(
    install: Install, tmp_path: Path, url: str, own: set[str]
) -> None:
    install("mine", RECORDING)
    install("foreign", RECORDING.replace("mine", "foreign"))
    # The entry points of these two plugins are not named after the scheme, but the second plugin claims it.
    install("broken", "raise RuntimeError('must not be imported')")
    scheme = url.partition(":")[0]
    install("claiming", RECORDING.replace('frozenset({"mine"})', f"frozenset({{{scheme!r}}})"))
    every = {
        *("flowstore_memory", "flowstore_sqlite", "flowstore_postgres", "aiosqlite", "asyncpg"),
        *("plugin_of_mine", "plugin_of_foreign", "plugin_of_broken", "plugin_of_claiming"),
    }
    imported = _imported_for(url.format(folder=tmp_path))
    assert own <= imported
    assert not imported & (every - own)


def test_plugins_all_plugins_are_searched_for_a_scheme_without_an_entry_point(install: Install) -> None:
    install("mine", RECORDING.replace('frozenset({"mine"})', 'frozenset({"mine", "unnamed"})'))
    install("broken", "raise RuntimeError('broken')")
    assert find_backend("unnamed")[0].name == "mine"


def test_plugins_two_entry_points_with_one_name_are_refused(install: Install) -> None:
    install("first", RECORDING, entry="mine")
    install("second", RECORDING, entry="mine")
    with pytest.raises(UnknownBackendError) as caught:
        find_backend("mine")
    for name in ("dist-of-first", "dist-of-second"):
        assert name in str(caught.value)


def test_plugins_the_traceback_of_a_broken_plugin_does_not_grow(install: Install) -> None:
    install("mine", "raise RuntimeError('broken')")
    depths = set()
    for _ in range(3):
        with pytest.raises(BackendLoadError) as caught:
            find_backend("mine")
        depths.add(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(depths) == 1


async def test_plugins_a_plugin_may_provide_several_backends(install: Install) -> None:
    code = RECORDING + (
        "\n\nclass Other(Backend):\n    name = 'other'\n    schemes = frozenset({'other', 'another'})\n"
        "\n\n@fs.hookimpl\ndef flowstore_backends():\n    return [Backend(), Other()]\n"
    )
    install("mine", code)
    for scheme, name in (("mine", "mine"), ("other", "other"), ("another", "other")):
        async with open_store(f"{scheme}://x") as store:
            assert store.backend == name


async def test_plugins_a_backend_may_implement_a_part_of_the_base(install: Install) -> None:
    code = RECORDING.replace("frozenset(fs.Capability)", "frozenset()").replace(
        'operation.startswith("_")', 'operation not in ("start_run", "try_claim_step")'
    )
    install("mine", code)
    async with open_store("mine://x") as store:
        await _use_partial_store(store)


async def _use_partial_store(store: FlowStore) -> None:
    assert store.capabilities == frozenset()
    await store.ping()
    started: Any = await store.start_run(uuid4(), "orders", uuid4(), "manual")
    claimed: Any = await store.try_claim_step(uuid4(), "charge", owner="me")
    assert (started, claimed) == ("start_run of innermost", "try_claim_step of innermost")
    with pytest.raises(NotSupportedError) as caught:
        await store.get_runs()
    assert (caught.value.backend, caught.value.operation) == ("mine", "get_runs")
