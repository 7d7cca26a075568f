"""The suite finds what authors of key-value backends get wrong, here made wrong in the toolkit itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import pytest
from flowstore_conformance import race_search, state_probe
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Kind
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core.plugins import find_backend
from flowstore_documents import committer, transfer
from flowstore_documents.committer import Committer
from flowstore_documents.run_state import RunState
from flowstore_documents.space import MaybeApplied, View
from flowstore_documents.transactions import Transaction
from tests.documents_backend import DIST
from tests.test_conformance_builtins import SEED

Mutate = Callable[[pytest.MonkeyPatch], None]


def resend_blindly(patch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Committer, operation: str, slot: Any) -> bool:
        return False

    patch.setattr(Committer, "_resolve", resolve)


def believe_blindly(patch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Committer, operation: str, slot: Any) -> bool:
        return True

    patch.setattr(Committer, "_resolve", resolve)


def look_without_a_fence(patch: pytest.MonkeyPatch) -> None:
    async def fence(self: Committer, slot: Any) -> bool:
        found = (await self._space.read([slot.key])).found.get(slot.key)
        return found is not None and found.value == slot.mark

    def take_slot(self: Committer, now: Any) -> Any:
        self._free.clear()
        return original(self, now)

    original = Committer._take_slot
    patch.setattr(Committer, "_fence", fence)
    patch.setattr(Committer, "_take_slot", take_slot)


def give_up_after_a_lost_answer(patch: pytest.MonkeyPatch) -> None:
    async def resolve(self: Committer, operation: str, slot: Any) -> bool:
        raise MaybeApplied

    patch.setattr(Committer, "_resolve", resolve)


def put_no_ticks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "_put_ticks", lambda self, old, new: None)


def expect_no_ticks(patch: pytest.MonkeyPatch) -> None:
    def expect(self: Transaction, key: bytes) -> None:
        if key[17:18] not in (b"T", b"n"):
            original(self, key)

    original = Transaction.expect
    patch.setattr(Transaction, "expect", expect)


def expect_no_renewals(patch: pytest.MonkeyPatch) -> None:
    def expect(self: Transaction, key: bytes) -> None:
        if key[17:18] != b"H":
            original(self, key)

    original = Transaction.expect
    patch.setattr(Transaction, "expect", expect)


def share_no_ticks(patch: pytest.MonkeyPatch) -> None:
    def without_ticks(group: Any) -> Any:
        return original(group)[: len(group)]

    original = committer._share_ticks
    patch.setattr(committer, "_share_ticks", without_ticks)


def expect_no_mailbox(patch: pytest.MonkeyPatch) -> None:
    def expect(self: Transaction, key: bytes) -> None:
        if key[17:18] != b"m":
            original(self, key)

    original = Transaction.expect
    patch.setattr(Transaction, "expect", expect)


def keep_tag_entries(patch: pytest.MonkeyPatch) -> None:
    def delete(self: Transaction, key: bytes) -> None:
        if not key.startswith(b"ig"):
            original(self, key)

    original = Transaction.delete
    patch.setattr(Transaction, "delete", delete)


def import_over_registered_keys(patch: pytest.MonkeyPatch) -> None:
    async def find_key(tx: Transaction, scope: bytes) -> None:
        return None

    patch.setattr(transfer, "find_key", find_key)


def read_torn_states(patch: pytest.MonkeyPatch) -> None:
    async def is_consistent(self: Transaction) -> bool:
        return True

    async def read_nothing_ahead(self: Transaction, wanted: Collection[bytes], ahead: object) -> View:
        view = await self.read(wanted, expect=False)
        await asyncio.sleep(0.005)
        return view

    patch.setattr(Transaction, "is_consistent", is_consistent)
    # Otherwise one read has all of a small run. Meanwhile other calls write.
    patch.setattr(Transaction, "read_ahead", read_nothing_ahead)


@pytest.mark.parametrize(
    ("mutate", "check_name"),
    [
        (resend_blindly, "a_lost_reply_is_resolved"),
        (believe_blindly, "a_late_request_changes_nothing"),
        (look_without_a_fence, "a_late_request_changes_nothing"),
        (give_up_after_a_lost_answer, "a_lost_reply_is_resolved"),
        (put_no_ticks, "expected_ends_by_stores"),
        (expect_no_ticks, "expected_ends_by_stores"),
        (expect_no_renewals, "a_run_that_ends_beside_other_calls_leaves_the_queues"),
        (share_no_ticks, "expected_ends_by_stores"),
        (expect_no_mailbox, "early_signals_by_stores"),
        (keep_tag_entries, "examples_of_tag_2"),
        (import_over_registered_keys, "examples_of_xfr_3_with_transfer"),
    ],
)
async def test_the_suite_finds_the_fault(
    mutate: Mutate, check_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await expect_found("documents", mutate, check_name, monkeypatch)


async def test_the_suite_finds_torn_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without snapshots an export compares what it has read with the state at its end."""
    await expect_found(
        "documents-without-snapshots", read_torn_states, "exports_by_stores", monkeypatch, Profile.STANDARD
    )


async def expect_found(
    name: str,
    mutate: Mutate,
    check_name: str,
    monkeypatch: pytest.MonkeyPatch,
    profile: Profile = Profile.QUICK,
) -> None:
    monkeypatch.syspath_prepend(DIST)
    # A wrong result is permanent, and needs no shrinking here.
    monkeypatch.setattr(state_probe, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(race_search, "SHRINK_SECONDS", 0.0)
    backend = find_backend(name)[1]
    (check,) = [check for check in select_checks() if check.name == check_name]
    mutate(monkeypatch)
    if check.kind is Kind.FAULT:
        # The profile quick ends after a second, on a loaded machine before the call that shows the fault.
        profile = Profile.STANDARD
    result = await run_check(check, f"{name}://", backend, profile, SEED)
    assert result.status is Status.FAIL, result.reason
