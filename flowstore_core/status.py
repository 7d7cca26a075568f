"""The states of runs, steps and deliveries, and what a backend can do."""

from __future__ import annotations

from enum import StrEnum


class RunStatus(StrEnum):
    """The state of a run; every value but RUNNING is terminal."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_RUN_STATUSES


TERMINAL_RUN_STATUSES = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED})


class StepStatus(StrEnum):
    """The state of a step or of one attempt; SUCCEEDED, FAILED and SKIPPED are terminal."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SKIPPED = "Skipped"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STEP_STATUSES


TERMINAL_STEP_STATUSES = frozenset({StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED})


class SignalDeliveryStatus(StrEnum):
    """What became of one deliver_signal call (SIG-2, SIG-3)."""

    DELIVERED = "Delivered"
    NOT_FOUND = "NotFound"
    ALREADY_DELIVERED = "AlreadyDelivered"


class StallReason(StrEnum):
    """Why get_stalled_steps lists a step (STP-8)."""

    LEASE_EXPIRED = "LeaseExpired"
    DISPATCH_DUE = "DispatchDue"
    NOT_DISPATCHED = "NotDispatched"


class RunTimeseriesGranularity(StrEnum):
    """The width of a bucket of get_run_timeseries, in UTC."""

    HOUR = "hour"
    DAY = "day"


class Capability(StrEnum):
    """What a backend offers beyond the base protocols; test ``store.capabilities``, never isinstance."""

    LEASES = "leases"
    """``lease=`` of try_claim_step, and renew_step_claim."""
    TRIGGER = "trigger"
    """trigger_run."""
    RECOVERY = "recovery"
    """reschedule_step and get_stalled_steps."""
    DEADLINES = "deadlines"
    """get_runs_to_stop and extend_deadline."""
    WAITERS = "waiters"
    """expire_waiter and get_waiters."""
    EVENTS = "events"
    """append_event and get_run_events."""
    OUTPUTS = "outputs"
    """save_output, get_output and get_outputs."""
    DASHBOARD = "dashboard"
    """get_runs_page, get_statistics and get_run_timeseries."""
    DURABLE = "durable"
    """What returned survives kill -9 and, where the disk honours fsync, a power cut (CON-5)."""
    MULTI_PROCESS = "multi_process"
    """Several processes may open one store at once."""
    VIRTUAL_CLOCK = "virtual_clock"
    """open_store(clock=...) is honoured."""


CRASH_SAFE = frozenset(
    {
        Capability.LEASES,
        Capability.TRIGGER,
        Capability.RECOVERY,
        Capability.DEADLINES,
        Capability.WAITERS,
    }
)
"""What an engine needs to recover from crashes; with everything else the level is "full"."""
