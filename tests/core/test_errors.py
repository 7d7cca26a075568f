"""The hierarchy of errors, their attributes and their pickling."""

from __future__ import annotations

import copy
import inspect
import pickle
from uuid import UUID

import pytest

import flowstore_core
from flowstore_core import (
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

RUN = UUID(int=1)

ERRORS: list[tuple[FlowStoreError, dict[str, object]]] = [
    (
        InvalidArgumentError("take", "an int from 0 to 1,000", "bool"),
        {"argument": "take", "limit": "an int from 0 to 1,000"},
    ),
    (RunNotFoundError(RUN), {"run_id": RUN}),
    (StepNotFoundError(RUN, "charge"), {"run_id": RUN, "step_key": "charge"}),
    (ConflictError("message", run_id=RUN, step_key="charge"), {"run_id": RUN, "step_key": "charge"}),
    (RunAlreadyExistsError(RUN), {"run_id": RUN, "step_key": None}),
    (RunCompletedError(RUN, "charge"), {"run_id": RUN, "step_key": "charge"}),
    (RunNotCompletedError(RUN), {"run_id": RUN, "step_key": None}),
    (StepAlreadyCompletedError(RUN, "charge", 2), {"run_id": RUN, "step_key": "charge", "attempt": 2}),
    (
        StaleAttemptError(RUN, "charge", 1, 2),
        {"run_id": RUN, "step_key": "charge", "attempt": 1, "last_attempt": 2},
    ),
    (ClaimLostError(RUN, "charge"), {"run_id": RUN, "step_key": "charge"}),
    (
        NotSupportedError("mine", "leases", "renew_step_claim"),
        {"backend": "mine", "capability": "leases", "operation": "renew_step_claim"},
    ),
    (
        LimitExceededError("mine", "10,000 steps in a run"),
        {"backend": "mine", "limit": "10,000 steps in a run"},
    ),
    (StoreClosedError(), {}),
    (StoreUnavailableError("no answer"), {"reason": "no answer"}),
    (OutcomeUnknownError("start_run"), {"operation": "start_run"}),
    (SchemaVersionError(1, 2, "migrate it"), {"found": 1, "needed": 2}),
    (ConfigurationError("message"), {}),
    (UnknownBackendError("mine", "message"), {"scheme": "mine"}),
    (BackendLoadError("mine", "broken", "report it"), {"plugin": "mine", "remedy": "report it"}),
]


def test_every_error_is_tested() -> None:
    known = {
        value
        for _, value in inspect.getmembers(flowstore_core, inspect.isclass)
        if issubclass(value, FlowStoreError) and value is not FlowStoreError
    }
    assert known == {type(error) for error, _ in ERRORS}


@pytest.mark.parametrize(("error", "attributes"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_have_their_attributes_and_a_message(
    error: FlowStoreError, attributes: dict[str, object]
) -> None:
    for name, value in attributes.items():
        assert getattr(error, name) == value
    assert str(error)


@pytest.mark.parametrize(("error", "attributes"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_can_be_pickled_and_copied(
    error: FlowStoreError, attributes: dict[str, object], protocol: int
) -> None:
    for copied in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(copied) is type(error)
        assert (str(copied), copied.args, copied.__dict__) == (str(error), error.args, error.__dict__)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (InvalidArgumentError, ValueError),
        (RunNotFoundError, LookupError),
        (StepNotFoundError, LookupError),
        (RunAlreadyExistsError, ConflictError),
        (RunCompletedError, ConflictError),
        (RunNotCompletedError, ConflictError),
        (StepAlreadyCompletedError, ConflictError),
        (StaleAttemptError, ConflictError),
        (ClaimLostError, ConflictError),
        (OutcomeUnknownError, StoreUnavailableError),
        (UnknownBackendError, ConfigurationError),
        (BackendLoadError, ConfigurationError),
        (ConflictError, FlowStoreError),
        (NotSupportedError, FlowStoreError),
        (StoreClosedError, FlowStoreError),
        (StoreUnavailableError, FlowStoreError),
        (SchemaVersionError, FlowStoreError),
        (ConfigurationError, FlowStoreError),
    ],
)
def test_errors_have_the_base_classes_of_the_contract(kind: type[Exception], base: type[Exception]) -> None:
    assert issubclass(kind, base)


def test_errors_are_not_subclasses_of_unrelated_errors() -> None:
    assert not issubclass(InvalidArgumentError, LookupError)
    assert not issubclass(RunNotFoundError, ConflictError)
    assert not issubclass(SchemaVersionError, ConfigurationError)
