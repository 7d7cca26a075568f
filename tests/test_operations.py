"""The operation table is complete: everything that an operation needs exists somewhere in the project."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from flowstore_conformance.checks import operations as arguments
from flowstore_conformance.model import Model
from flowstore_conformance.operations import STRATEGIES
from flowstore_conformance.registry import all_checks
from flowstore_conformance.write_scenarios import SCENARIOS

from flowstore_core import FlowStore, SyncFlowStore
from flowstore_core.operations import OPERATIONS, Operation
from flowstore_core.validated_store import ValidatedStore
from flowstore_documents.store import CAPABILITIES as DOCUMENT_CAPABILITIES
from flowstore_documents.store import DocumentStore
from flowstore_memory.store import MemoryStore
from flowstore_postgres.hints import WatchingStore
from flowstore_sqlite.store import SqliteStore
from tests.mutants import all_mutants

ROOT = Path(__file__).parents[1]
CONTRACT = (ROOT / "docs/contract.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("flowstore_cli", "flowstore_core/inspection")
    for path in sorted((ROOT / folder).glob("*.py"))
)

ENGINES_ONLY = frozenset(
    {
        *("start_run", "complete_run", "trigger_run"),
        *("record_step_start", "record_step_complete", "record_skipped_step", "reschedule_step"),
        *("try_claim_step", "try_start_step", "release_step_claim", "renew_step_claim", "renew_step_claims"),
        "get_claimed_step_keys",
        *("try_record_dispatch", "annotate_dispatch", "release_dispatch"),
        *("claim_next_steps", "advance_run", "advance_runs", "redispatch_step"),
        *("configure_run", "mark_timed_out", "extend_deadline"),
        *("find_run_id_by_idempotency_key", "try_register_idempotency_key"),
        *("register_waiter", "get_waiter", "remove_waiter", "expire_waiter"),
        *("save_output", "save_outputs", "get_output", "delete_outputs", "append_event"),
        "wait_for_steps",
    }
)
"""Operations without a command: engines call them, people do not."""

CLASSES = {
    "a method of the FlowStore protocol": FlowStore,
    "a method of ValidatedStore": ValidatedStore,
    "a method of SyncFlowStore": SyncFlowStore,
    "a method of the memory backend": MemoryStore,
    "a method of the document toolkit": DocumentStore,
    "a method of the SQLite backend": SqliteStore,
    "a method of the PostgreSQL backend": WatchingStore,
    "a method of the conformance model": Model,
}

_IN_SCENARIOS = {factory(UUID(int=1), UUID(int=2))[1].method for factory in SCENARIOS.values()}
_CHECKED_CLAUSES = {clause for one in all_checks() for clause in one.clauses}
_BROKEN_CLAUSES = {mutant.clause for mutant in all_mutants().values()}


def missing(operation: Operation) -> Iterator[str]:
    """The parts of the project that an operation lacks."""
    name = operation.name
    for part, owner in CLASSES.items():
        # No model predicts a hint, so programs do not call it.
        if owner is Model and operation.is_hint:
            continue
        if owner is DocumentStore and operation.capability not in (None, *DOCUMENT_CAPABILITIES):
            continue
        if not callable(getattr(owner, name, None)):
            yield part
    if name not in STRATEGIES and not operation.is_hint:
        yield "a strategy in flowstore_conformance/operations.py"
    if name not in arguments.ARGUMENT_KINDS:
        yield "the kinds of its arguments in flowstore_conformance/checks/operations.py"
    # An operation over all runs has no scenario of one run; checks/cancellation.py cancels it separately.
    if operation.writes and not operation.spans_runs and name not in _IN_SCENARIOS:
        yield "a write scenario in flowstore_conformance/write_scenarios.py"
    for clause in operation.clauses:
        if clause not in _CHECKED_CLAUSES:
            yield f"a check of {clause}"
    if operation.clauses[0] not in _BROKEN_CLAUSES:
        yield f"a mutant that breaks {operation.clauses[0]}"
    if re.search(rf"^- `{name}\(", CONTRACT, re.M) is None:
        yield "a line in docs/contract.md"
    if name not in ENGINES_ONLY and re.search(rf"\.{name}\(", COMMANDS) is None:
        yield "a use in flowstore_cli, or an entry in ENGINES_ONLY of this file"


def test_every_operation_has_all_its_parts() -> None:
    lines = [f"{one.name} lacks {part}" for one in OPERATIONS.values() for part in missing(one)]
    assert not lines, "\n" + "\n".join(lines)


def test_the_table_has_a_row_for_every_method_of_the_protocol() -> None:
    methods = {
        name
        for name, _ in inspect.getmembers(FlowStore, inspect.isfunction)
        if not name.startswith("_") and name not in ("ping", "aclose")
    }
    assert methods == OPERATIONS.keys()
    assert all(name == operation.name for name, operation in OPERATIONS.items())


def test_operations_for_engines_only_exist_and_have_no_command() -> None:
    assert OPERATIONS.keys() >= ENGINES_ONLY
    assert [name for name in ENGINES_ONLY if re.search(rf"\.{name}\(", COMMANDS)] == []


def test_every_capability_with_operations_has_its_attribute_in_the_validated_store() -> None:
    capabilities = {one.capability for one in OPERATIONS.values() if one.capability is not None}
    assert {f"_{one}" for one in capabilities} <= ValidatedStore.__annotations__.keys()
