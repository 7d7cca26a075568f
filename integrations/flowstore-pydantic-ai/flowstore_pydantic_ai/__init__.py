"""Durable Pydantic AI agents on any flowstore store: a URL selects the database."""

from flowstore_pydantic_ai.capability import FlowstoreDurability
from flowstore_pydantic_ai.errors import (
    EventNotOpenError,
    OperationFailedError,
    RunFailedError,
    RunTakenOverError,
)
from flowstore_pydantic_ai.runner import DurableRunner

__all__ = [
    "DurableRunner",
    "EventNotOpenError",
    "FlowstoreDurability",
    "OperationFailedError",
    "RunFailedError",
    "RunTakenOverError",
]
