"""The protocols, records, errors and plugin hooks of workflow-run stores.

``open_store`` is the entry point. The docstrings of the protocols, one noun to a file, are the contract and
cite its clause ids. Engines import ``flowstore``; backends import ``flowstore_core.backend``.
"""

import logging

from flowstore_core.claims import (
    DispatchLedger,
    Leases,
    StepClaim,
    StepClaims,
    StepDispatch,
    new_claim_token,
)
from flowstore_core.config import StoreConfig
from flowstore_core.controls import (
    Deadlines,
    FlowRunControlRecord,
    IdempotencyKeys,
    RunControls,
    Trigger,
    TriggerResult,
)
from flowstore_core.errors import (
    BackendLoadError,
    ClaimLostError,
    ConfigurationError,
    ConflictError,
    FlowStoreError,
    InvalidArgumentError,
    LimitExceededError,
    NotSupportedError,
    OutcomeUnknownError,
    RunAlreadyExistsError,
    RunCompletedError,
    RunNotCompletedError,
    RunNotFoundError,
    SchemaVersionError,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepNotFoundError,
    StoreClosedError,
    StoreUnavailableError,
    UnknownBackendError,
)
from flowstore_core.events import Events, FlowEventRecord
from flowstore_core.identifiers import new_run_id
from flowstore_core.limits import StoreLimits
from flowstore_core.open import open_store
from flowstore_core.outputs import Outputs
from flowstore_core.plugins import Backend, hookimpl, hookspec
from flowstore_core.queues import (
    ClaimedStep,
    EndedStep,
    Queues,
    QueueStatistics,
    RunAdvance,
    StepRequest,
)
from flowstore_core.retention import Deletion, FlowRetentionStore
from flowstore_core.runs import (
    FlowRunDetail,
    FlowRunRecord,
    RunLifecycle,
    RunPage,
    RunPages,
    RunPosition,
)
from flowstore_core.signals import (
    BufferedSignal,
    FlowSignalWaiter,
    Mailbox,
    SignalDeliveryResult,
    Signals,
    SignalWaiters,
)
from flowstore_core.statistics import Dashboard, DashboardStatistics, RunTimeseriesBucket
from flowstore_core.status import (
    CRASH_SAFE,
    PROPERTIES,
    Capability,
    RunStatus,
    RunTimeseriesGranularity,
    SignalDeliveryStatus,
    StallReason,
    StepStatus,
)
from flowstore_core.steps import (
    FlowStepAttemptRecord,
    FlowStepRecord,
    Recovery,
    StalledStep,
    StepAttempts,
    StepRuntime,
)
from flowstore_core.store import (
    FlowRunControlStore,
    FlowRunRuntimeStore,
    FlowRunStore,
    FlowSignalStore,
    FlowStore,
)
from flowstore_core.sync import SyncFlowStore, open_store_sync
from flowstore_core.tags import Tags
from flowstore_core.transfer import (
    ArchivedControl,
    ArchivedDelivery,
    ArchivedKey,
    ArchivedStep,
    RunArchive,
    Transfer,
)
from flowstore_core.watching import Watch

__all__ = [
    "CRASH_SAFE",
    "PROPERTIES",
    "ArchivedControl",
    "ArchivedDelivery",
    "ArchivedKey",
    "ArchivedStep",
    "Backend",
    "BackendLoadError",
    "BufferedSignal",
    "Capability",
    "ClaimLostError",
    "ClaimedStep",
    "ConfigurationError",
    "ConflictError",
    "Dashboard",
    "DashboardStatistics",
    "Deadlines",
    "Deletion",
    "DispatchLedger",
    "EndedStep",
    "Events",
    "FlowEventRecord",
    "FlowRetentionStore",
    "FlowRunControlRecord",
    "FlowRunControlStore",
    "FlowRunDetail",
    "FlowRunRecord",
    "FlowRunRuntimeStore",
    "FlowRunStore",
    "FlowSignalStore",
    "FlowSignalWaiter",
    "FlowStepAttemptRecord",
    "FlowStepRecord",
    "FlowStore",
    "FlowStoreError",
    "IdempotencyKeys",
    "InvalidArgumentError",
    "Leases",
    "LimitExceededError",
    "Mailbox",
    "NotSupportedError",
    "OutcomeUnknownError",
    "Outputs",
    "QueueStatistics",
    "Queues",
    "Recovery",
    "RunAdvance",
    "RunAlreadyExistsError",
    "RunArchive",
    "RunCompletedError",
    "RunControls",
    "RunLifecycle",
    "RunNotCompletedError",
    "RunNotFoundError",
    "RunPage",
    "RunPages",
    "RunPosition",
    "RunStatus",
    "RunTimeseriesBucket",
    "RunTimeseriesGranularity",
    "SchemaVersionError",
    "SignalDeliveryResult",
    "SignalDeliveryStatus",
    "SignalWaiters",
    "Signals",
    "StaleAttemptError",
    "StallReason",
    "StalledStep",
    "StepAlreadyCompletedError",
    "StepAttempts",
    "StepClaim",
    "StepClaims",
    "StepDispatch",
    "StepNotFoundError",
    "StepRequest",
    "StepRuntime",
    "StepStatus",
    "StoreClosedError",
    "StoreConfig",
    "StoreLimits",
    "StoreUnavailableError",
    "SyncFlowStore",
    "Tags",
    "Transfer",
    "Trigger",
    "TriggerResult",
    "UnknownBackendError",
    "Watch",
    "hookimpl",
    "hookspec",
    "new_claim_token",
    "new_run_id",
    "open_store",
    "open_store_sync",
]

# Without a handler, warnings would go to stderr.
logging.getLogger("flowstore_core").addHandler(logging.NullHandler())
