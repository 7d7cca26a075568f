"""The operation table: one row for each operation of the contract.

Capabilities, the validated store, the conformance suite and the tests of the documentation derive their
tables from it. To add an operation, add a row; ``tests/test_operations.py`` then lists the missing parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flowstore_core.status import Capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of a store."""

    name: str
    """The name of the method."""
    clauses: tuple[str, ...]
    """The clauses that specify it; a wrong result most likely breaks the first."""
    capability: Capability | None = None
    """The capability that it belongs to; None for the base protocols."""
    writes: bool = False
    """Whether it may change the store."""
    spans_runs: bool = False
    """Whether it reads or changes several runs at once (CON-1)."""
    shows_state: bool = False
    """Whether it reads state that earlier writes of the same run stored."""
    is_hint: bool = False
    """Whether its result is a hint that the stored state does not determine (WAT-1)."""

    def is_offered(self, capabilities: Collection[Capability]) -> bool:
        """Whether a store with these capabilities has the operation."""
        return self.capability is None or self.capability in capabilities


def _read(
    name: str, *clauses: str, capability: Capability | None = None, shows_state: bool = True
) -> Operation:
    return Operation(name=name, clauses=clauses, capability=capability, shows_state=shows_state)


def _write(name: str, *clauses: str, capability: Capability | None = None) -> Operation:
    return Operation(name=name, clauses=clauses, capability=capability, writes=True)


def _query(name: str, *clauses: str, capability: Capability | None = None) -> Operation:
    return Operation(name=name, clauses=clauses, capability=capability, spans_runs=True)


def _hint(name: str, *clauses: str, capability: Capability) -> Operation:
    return Operation(name=name, clauses=clauses, capability=capability, is_hint=True)


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        operation.name: operation
        for operation in (
            # Runs
            _write("start_run", "RUN-1"),
            _write("complete_run", "RUN-2"),
            _query("get_runs", "QRY-1"),
            _query("get_active_runs", "QRY-6"),
            _query("get_derived_runs", "QRY-6"),
            _query("get_runs_page", "QRY-2", "QRY-1", "QRY-3", capability=Capability.DASHBOARD),
            _read("get_run", "QRY-3", "UNK"),
            _read("get_run_detail", "QRY-3"),
            _read("get_run_status", "RUN-2", "UNK"),
            _write("set_tags", "TAG-2", "TAG-1", capability=Capability.TAGS),
            # Steps
            _write("record_step_start", "STP-1", "STP-2", "STP-3"),
            _write("record_step_complete", "STP-4"),
            _write("record_skipped_step", "STP-5"),
            _write("retry_step", "STP-6"),
            _read("get_step", "QRY-3", "UNK"),
            _read("get_step_statuses", "STP-4", "UNK"),
            _write("reschedule_step", "STP-7", capability=Capability.RECOVERY),
            _query("get_stalled_steps", "STP-8", capability=Capability.RECOVERY),
            # Claims and the dispatch ledger
            _write("try_claim_step", "CLM-5", "CLM-1"),
            _write("release_step_claim", "CLM-3"),
            _write("try_start_step", "CLM-8", capability=Capability.LEASES),
            _write("renew_step_claim", "CLM-6", capability=Capability.LEASES),
            Operation(
                name="renew_step_claims",
                clauses=("CLM-6",),
                capability=Capability.LEASES,
                writes=True,
                spans_runs=True,
            ),
            _read("get_claimed_step_keys", "CLM-4", shows_state=False),
            _read("get_step_claims", "CLM-4"),
            _write("try_record_dispatch", "CLM-1"),
            _write("annotate_dispatch", "CLM-7"),
            _write("release_dispatch", "CLM-3"),
            _read("get_dispatched_step_keys", "CLM-1", "CLM-3"),
            _read("get_dispatches", "CLM-1", "CLM-3"),
            # Queues
            Operation(
                name="claim_next_steps",
                clauses=("QUE-1", "QUE-2", "QUE-3"),
                capability=Capability.QUEUES,
                writes=True,
                spans_runs=True,
            ),
            _write("advance_run", "QUE-4", "QUE-6", capability=Capability.QUEUES),
            Operation(
                name="advance_runs",
                clauses=("QUE-4", "QUE-6"),
                capability=Capability.QUEUES,
                writes=True,
                spans_runs=True,
            ),
            _write("redispatch_step", "QUE-7", capability=Capability.QUEUES),
            _query("get_queues", "QUE-8", "QUE-5", capability=Capability.QUEUES),
            _hint("wait_for_steps", "WAT-1", "WAT-2", capability=Capability.WATCH),
            _hint("wait_for_run", "WAT-1", "WAT-2", capability=Capability.WATCH),
            # Control, idempotency keys, the trigger
            _write("configure_run", "CTL-1"),
            _read("get_run_control", "CTL-2", "CTL-1"),
            _query("get_run_controls", "CTL-1"),
            _write("request_cancel", "CTL-2"),
            _write("mark_timed_out", "CTL-2"),
            _query("get_runs_to_stop", "CTL-3", capability=Capability.DEADLINES),
            _write("extend_deadline", "CTL-3", capability=Capability.DEADLINES),
            _read("find_run_id_by_idempotency_key", "IDM-2"),
            _write("try_register_idempotency_key", "IDM-2"),
            _write("trigger_run", "IDM-3", capability=Capability.TRIGGER),
            # Signals
            _write("register_waiter", "SIG-1"),
            _write("deliver_signal", "SIG-2", "SIG-3", "MBX-1", "MBX-2"),
            _read("get_waiter", "SIG-1", "UNK"),
            _write("remove_waiter", "SIG-4"),
            _write("expire_waiter", "SIG-4", capability=Capability.WAITERS),
            _read("get_waiters", "QRY-1", capability=Capability.WAITERS),
            _read("get_buffered_signals", "MBX-1", capability=Capability.MAILBOX),
            # Outputs and events
            _write("save_output", "EVT-2", capability=Capability.OUTPUTS),
            _write("save_outputs", "EVT-2", capability=Capability.OUTPUTS),
            _read("get_output", "EVT-2", capability=Capability.OUTPUTS),
            _read("get_outputs", "EVT-2", capability=Capability.OUTPUTS),
            _write("delete_outputs", "EVT-2", capability=Capability.OUTPUTS),
            _write("append_event", "EVT-1", capability=Capability.EVENTS),
            _read("get_run_events", "EVT-1", capability=Capability.EVENTS, shows_state=False),
            # Transfer
            _read("export_run", "XFR-2", "XFR-1", capability=Capability.TRANSFER),
            _write("import_run", "XFR-3", "XFR-1", "XFR-4", capability=Capability.TRANSFER),
            # Retention and statistics
            Operation(name="cleanup", clauses=("RET-1",), writes=True, spans_runs=True),
            _write("delete_run", "RET-5", capability=Capability.DELETION),
            _query("get_statistics", "QRY-4", capability=Capability.DASHBOARD),
            _query("get_run_timeseries", "QRY-5", capability=Capability.DASHBOARD),
        )
    }
)
"""Every operation of FlowStore except ``ping`` and ``aclose``, which every store has."""

_QUEUES = Capability.QUEUES
_TAGS = Capability.TAGS

KEYWORD_CAPABILITIES: Mapping[str, Mapping[str, Capability]] = MappingProxyType(
    {
        "start_run": {"tags": _TAGS},
        "get_runs": {"tags": _TAGS},
        "get_runs_page": {"tags": _TAGS},
        "try_claim_step": {"lease": Capability.LEASES},
        "try_record_dispatch": dict.fromkeys(("queue", "priority", "step_type", "input_json"), _QUEUES),
        "trigger_run": {"dispatch": _QUEUES, "tags": _TAGS},
        "retry_step": {"dispatch": _QUEUES},
        "reschedule_step": {"error_message": _QUEUES},
        "deliver_signal": {"buffer": Capability.MAILBOX},
    }
)
"""The keywords that belong to another capability than their operation: core passes them on only with it."""

BASE_OPERATIONS: tuple[str, ...] = (
    "ping",
    *(one.name for one in OPERATIONS.values() if one.capability is None),
)
"""The operations of the base protocols. A backend may lack some; calling one raises NotSupportedError."""


def _methods_of(capability: Capability) -> tuple[str, ...]:
    return tuple(one.name for one in OPERATIONS.values() if one.capability is capability)


CAPABILITY_METHODS: Mapping[Capability, tuple[str, ...]] = MappingProxyType(
    {capability: _methods_of(capability) for capability in Capability if _methods_of(capability)}
)
"""The methods that a backend needs to offer a capability. Facts such as DURABLE need none."""
