"""The tree of errors, their attributes and their pickling."""

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
    NotSupportedError,
    OutcomeUnknownError,
    RunAlreadyExistsError,
    RunCompletedError,
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
    (StoreClosedError(), {}),
    (StoreUnavailableError("no answer"), {"reason": "no answer"}),
    (OutcomeUnknownError("start_run"), {"operation": "start_run"}),
    (SchemaVersionError(1, 2, "migrate it"), {"found": 1, "needed": 2}),
    (ConfigurationError("message"), {}),
    (UnknownBackendError("mine", "message"), {"scheme": "mine"}),
    (BackendLoadError("mine", "broken", "report it"), {"plugin": "mine", "remedy": "report it"}),
]


def test_errors_every_error_is_covered() -> None:
    known = {
        value
        for _, value in inspect.getmembers(flowstore_core, inspect.isclass)
        if issubclass(value, FlowStoreError) and value is not FlowStoreError
    }
    assert known == {type(error) for error, _ in ERRORS}


@pytest.mark.parametrize(("error", "attributes"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_carry_typed_attributes_and_show_them(
    error: FlowStoreError, attributes: dict[str, object]
) -> None:
    for name, value in attributes.items():
        assert getattr(error, name) == value
    assert str(error)


@pytest.mark.parametrize(("error", "attributes"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_travel_between_processes(
    error: FlowStoreError, attributes: dict[str, object], protocol: int
) -> None:
    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is type(error)
        assert (str(back), back.args, back.__dict__) == (str(error), error.args, error.__dict__)


@pytest.mark.parametrize(
    ("kind", "above"),
    [
        (InvalidArgumentError, ValueError),
        (RunNotFoundError, LookupError),
        (StepNotFoundError, LookupError),
        (RunAlreadyExistsError, ConflictError),
        (RunCompletedError, ConflictError),
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
def test_errors_form_the_tree_of_the_contract(kind: type[Exception], above: type[Exception]) -> None:
    assert issubclass(kind, above)


def test_argument_errors_are_not_lookup_errors() -> None:
    assert not issubclass(InvalidArgumentError, LookupError)
    assert not issubclass(RunNotFoundError, ConflictError)
    assert not issubclass(SchemaVersionError, ConfigurationError)
