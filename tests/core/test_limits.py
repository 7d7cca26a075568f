"""The limits of a store: their bounds, where they come from, and the arguments that core checks (LIM-1)."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import pytest
from flowstore_conformance.archives import full_archive
from flowstore_conformance.checks.operations import ARGUMENT_KINDS, RUN, arguments_beyond

from flowstore_core import (
    BackendLoadError,
    Capability,
    InvalidArgumentError,
    NotSupportedError,
    StepRequest,
    StoreClosedError,
    StoreLimits,
    open_store,
)
from flowstore_core.backend import SMALLEST_LIMITS, Limited, SharedClock
from flowstore_core.plugins import find_backend
from tests.core.conftest import RECORDING, Install

LIMITED = RECORDING.replace(
    "    contract_version = 1\n", "    contract_version = 1\n    limits = fs.backend.SMALLEST_LIMITS\n"
).replace("import flowstore_core as fs", "import flowstore_core as fs\nimport flowstore_core.backend")
assert LIMITED != RECORDING

KEY, TEXT = "\u00e9" * 128, "x" * 65_534 + "\u00e9"
"""The longest key and text within the smallest limits."""


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("text_bytes", 65_536, 16_777_216),
        ("key_bytes", 256, 1_024),
        ("run_steps", 10_000, None),
        ("run_bytes", 16_777_216, None),
        ("page_size", 200, 1_000),
    ],
)
def test_a_limit_outside_its_bounds_is_refused(name: str, low: int, high: int | None) -> None:
    wrong: list[Any] = [low - 1, float(low), str(low), True]
    wrong += [None, high + 1] if high is not None else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name} must be an int from {low:,}"):
            StoreLimits(**{name: value})
    assert getattr(StoreLimits(**{name: low}), name) == low
    assert getattr(StoreLimits(), name) == high
    assert getattr(SMALLEST_LIMITS, name) == low


def test_reduced_limits_are_named() -> None:
    assert StoreLimits().reduced() == ()
    assert SMALLEST_LIMITS.reduced() == (
        "texts of 65,536 bytes",
        "keys of 256 bytes",
        "10,000 steps in a run",
        "16,777,216 bytes in a run",
        "pages of 200",
    )
    assert StoreLimits(key_bytes=1_024, page_size=500).reduced() == ("pages of 500",)


async def test_a_backend_without_limits_has_the_largest(install: Install) -> None:
    install("mine", RECORDING)
    async with open_store("mine://x") as store:
        assert store.limits == StoreLimits()
        assert store.max_skew == timedelta(seconds=1)


async def test_the_limits_of_a_store_override_those_of_its_backend(install: Install) -> None:
    own = "    limits = fs.StoreLimits(run_steps=20_000)\n    max_skew = timedelta(0)\n\n    async def ping"
    install("mine", LIMITED.replace("    async def ping", own))
    assert isinstance(find_backend("mine")[1], Limited)
    assert isinstance(find_backend("mine")[1], SharedClock)
    async with open_store("mine://x") as store:
        assert store.limits == StoreLimits(run_steps=20_000)
        assert store.max_skew == timedelta(0)
        await store.save_output(RUN, "key", TEXT * 2)


async def test_a_store_without_a_shared_clock_has_no_max_skew(install: Install) -> None:
    install("mine", RECORDING.replace("frozenset(fs.Capability)", "frozenset({fs.Capability.EVENTS})"))
    async with open_store("mine://x") as store:
        assert store.max_skew is None


async def test_a_store_that_shares_a_clock_must_state_its_max_skew(install: Install) -> None:
    code = RECORDING.replace("max_skew = timedelta(seconds=1)", "").replace(
        "capabilities = frozenset(fs.Capability)", "capabilities = frozenset()"
    )
    own = "    capabilities = frozenset({fs.Capability.SHARED_CLOCK})\n\n    async def ping"
    install("mine", code.replace("    async def ping", own))
    with pytest.raises(BackendLoadError, match="shared_clock but no max_skew"):
        async with open_store("mine://x"):
            pass


@pytest.mark.parametrize("operation", ARGUMENT_KINDS)
async def test_arguments_beyond_the_limits_are_refused(install: Install, operation: str) -> None:
    install("mine", LIMITED)
    async with open_store("mine://x") as store:
        for name, arguments in arguments_beyond(operation, SMALLEST_LIMITS):
            with pytest.raises(InvalidArgumentError, match="the limit of backend 'mine'") as caught:
                await getattr(store, operation)(**arguments)
            assert caught.value.argument.partition(".")[0] == name
            assert len(str(caught.value)) < 200, "the error does not show the value"
    assert importlib.import_module("plugin_of_mine").calls == []


async def test_arguments_at_the_limits_reach_the_backend(install: Install) -> None:
    install("mine", LIMITED)
    async with open_store("mine://x") as store:
        await store.start_run(RUN, KEY, RUN, KEY, trigger_data=TEXT, job_id="\u00e9" * 1_024, tags={KEY: KEY})
        await store.save_outputs(RUN, {KEY: TEXT})
        await store.save_output(RUN, "k" * 256, TEXT)
        await store.get_runs(take=200)
        await store.get_runs_page(search="\u00e9" * 256)
        await store.claim_next_steps([KEY], lease=timedelta(seconds=1), limit=1_000)
    assert len(importlib.import_module("plugin_of_mine").calls) == 6


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("archive.run.trigger_key", lambda archive: {"run": replace(archive.run, trigger_key=KEY + "x")}),
        ("archive.run.tags[0]", lambda archive: {"run": replace(archive.run, tags=((KEY + "x", "v"),))}),
        ("archive.outputs[0]", lambda archive: {"outputs": (("key", TEXT + "x"),)}),
        ("archive.outputs[0]", lambda archive: {"outputs": ((KEY + "x", TEXT),)}),
        (
            "archive.events[0].message",
            lambda archive: {"events": (replace(archive.events[0], message=TEXT + "x"), *archive.events[1:])},
        ),
        (
            "archive.control.cancel_reason",
            lambda archive: {"control": replace(archive.control, cancel_reason=TEXT + "x")},
        ),
    ],
)
async def test_archives_beyond_the_limits_are_refused(install: Install, part: str, change: Any) -> None:
    install("mine", LIMITED)
    archive = full_archive(RUN)
    async with open_store("mine://x") as store:
        await store.import_run(archive)
        with pytest.raises(InvalidArgumentError, match="the limit of backend 'mine'") as caught:
            await store.import_run(replace(archive, **change(archive)))
    assert caught.value.argument == part


async def test_limits_of_arguments_precede_closed_and_not_supported(install: Install) -> None:
    install("mine", LIMITED.replace("frozenset(fs.Capability)", "frozenset()"))
    async with open_store("mine://x") as store:
        with pytest.raises(NotSupportedError):
            await store.save_output(RUN, "key", TEXT)
        with pytest.raises(NotSupportedError):
            await store.start_run(RUN, "flow", RUN, "manual", tags={"env": "test"})
        await store.aclose()
        for call in (store.save_output(RUN, "key", TEXT + "x"), store.get_step(RUN, KEY + "x")):
            with pytest.raises(InvalidArgumentError):
                await call
        with pytest.raises(StoreClosedError):
            await store.get_step(RUN, KEY)


def test_every_field_of_a_request_has_a_limit_of_its_kind() -> None:
    assert {field.name for field in fields(StepRequest) if "str" in str(field.type)} == {
        *("step_key", "step_type", "input_json", "queue", "after"),
    }


@pytest.mark.parametrize("name", ["memory", "sqlite", "postgresql"])
def test_the_built_in_backends_have_the_largest_limits(name: str) -> None:
    backend = find_backend(name)[1]
    assert not isinstance(backend, Limited)
    shared = Capability.SHARED_CLOCK in backend.capabilities
    assert shared == isinstance(backend, SharedClock) == (name == "postgresql")
