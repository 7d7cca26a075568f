"""Intents keep the contract: every change takes the path of a large one, and every end of a run that of a
run in which other calls change steps all the time."""

from __future__ import annotations

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core.plugins import find_backend
from flowstore_documents import Change, runs, transfer
from flowstore_documents.store import CAPABILITIES
from flowstore_documents.transactions import Transactions
from tests.documents_backend import DIST
from tests.test_conformance_builtins import SEED

NAMES = ("call_sequences_agree_with_the_model", "a_lost_reply_is_resolved", "a_cancelled_write_is_atomic")
# Random programs, and the races and faults of calls that change a run.
CHECKS = [
    check
    for check in select_checks()
    if check.needs <= CAPABILITIES and (check.name.endswith("_by_stores") or check.name in NAMES)
]


def fits(self: Transactions, change: Change, *, more_writes: int = 0) -> bool:
    """Whether a change is outside of a stored run: what is registered before a run is always small."""
    gates = [key for key in change.expected if key.startswith(b"r") and key[17:18] == b"G"]
    return not any(change.expected[key] or key in change.puts for key in gates)


def name_of(check: Check) -> str:
    return check.name


async def expect_pass(check: Check) -> None:
    result = await run_check(check, "documents://", find_backend("documents")[1], Profile.QUICK, SEED)
    said = result.failure.message if result.failure is not None else result.reason
    assert result.status is Status.PASS, said


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
async def test_every_change_is_staged(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)
    monkeypatch.setattr(Transactions, "_fits", fits)
    await expect_pass(check)


@pytest.mark.parametrize(
    "check",
    [
        check
        for check in select_checks()
        if check.needs <= CAPABILITIES and {"XFR-1", "XFR-3"} & {*check.clauses}
    ],
    ids=name_of,
)
async def test_every_import_registers_its_keys_one_by_one(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DIST)
    monkeypatch.setattr(transfer, "_has_many_keys", lambda tx: True)
    await expect_pass(check)


@pytest.mark.parametrize("check", [check for check in CHECKS if "RUN-2" in check.clauses], ids=name_of)
async def test_every_run_ends_by_an_intent(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)
    monkeypatch.setattr(runs, "LOST_TRIES", 0)
    await expect_pass(check)
