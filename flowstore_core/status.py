"""The statuses of runs, steps and deliveries, and the capabilities of backends."""

from __future__ import annotations

from enum import StrEnum


class RunStatus(StrEnum):
    """The status of a run; terminal unless RUNNING."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_RUN_STATUSES


TERMINAL_RUN_STATUSES = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED})


class StepStatus(StrEnum):
    """The status of a step or an attempt; SUCCEEDED, FAILED and SKIPPED are terminal."""

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
    """The status of a deliver_signal call (SIG-2, SIG-3, MBX-1)."""

    DELIVERED = "Delivered"
    NOT_FOUND = "NotFound"
    ALREADY_DELIVERED = "AlreadyDelivered"
    BUFFERED = "Buffered"


class StallReason(StrEnum):
    """The reason why get_stalled_steps lists a step (STP-8)."""

    LEASE_EXPIRED = "LeaseExpired"
    DISPATCH_DUE = "DispatchDue"
    NOT_DISPATCHED = "NotDispatched"


class RunTimeseriesGranularity(StrEnum):
    """The bucket width of get_run_timeseries, in UTC."""

    HOUR = "hour"
    DAY = "day"


class Capability(StrEnum):
    """A feature beyond the base protocols. Test ``store.capabilities``; isinstance does not work."""

    LEASES = "leases"
    """``lease=`` of try_claim_step, renew_step_claim and renew_step_claims."""
    TRIGGER = "trigger"
    """trigger_run."""
    RECOVERY = "recovery"
    """reschedule_step and get_stalled_steps."""
    DEADLINES = "deadlines"
    """get_runs_to_stop and extend_deadline."""
    WAITERS = "waiters"
    """expire_waiter and get_waiters."""
    MAILBOX = "mailbox"
    """``buffer=`` of deliver_signal, and get_buffered_signals."""
    EVENTS = "events"
    """append_event and get_run_events."""
    OUTPUTS = "outputs"
    """save_output, save_outputs, get_output, get_outputs and delete_outputs."""
    DASHBOARD = "dashboard"
    """get_runs_page, get_statistics and get_run_timeseries."""
    QUEUES = "queues"
    """claim_next_steps, advance_run, advance_runs, redispatch_step, get_queues; queues of dispatches."""
    WATCH = "watch"
    """wait_for_steps and wait_for_run."""
    DELETION = "deletion"
    """delete_run."""
    TRANSFER = "transfer"
    """export_run and import_run."""
    TAGS = "tags"
    """set_tags; ``tags=`` of start_run, trigger_run, get_runs and get_runs_page."""
    DURABLE = "durable"
    """A returned write survives kill -9 and, if the disk honours fsync, a power cut (CON-5)."""
    MULTI_PROCESS = "multi_process"
    """Several processes may open one store at the same time."""
    VIRTUAL_CLOCK = "virtual_clock"
    """open_store(clock=...) is honoured."""
    SHARED_CLOCK = "shared_clock"
    """All processes go by one clock, however wrong the clocks of their machines are (CLK-1)."""


PROPERTIES = frozenset(
    {
        Capability.DURABLE,
        Capability.MULTI_PROCESS,
        Capability.VIRTUAL_CLOCK,
        Capability.SHARED_CLOCK,
    }
)
"""The capabilities that add no operation. No level needs them; each is stated beside the level."""

CRASH_SAFE = frozenset(
    {
        Capability.LEASES,
        Capability.TRIGGER,
        Capability.RECOVERY,
        Capability.DEADLINES,
        Capability.WAITERS,
    }
)
"""The capabilities that an engine needs to recover from crashes: level crash-safe."""
