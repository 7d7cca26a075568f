"""The capability that routes the operations of an agent through the run of the current context."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from pydantic_ai.durable_exec import (
    JSON_CODEC,
    BaseDurabilityCapability,
    DurabilityEngineSpec,
    DurableOperationBackend,
    DurableOperationId,
    JournalCallableOperationBackend,
    RoleBasedOperationConfig,
    conversation_id_from_run_id,
)
from pydantic_ai.tools import AgentDepsT, RunContext

from flowstore_pydantic_ai.execution import current_execution


class FlowstoreDurability(BaseDurabilityCapability[AgentDepsT]):
    """Makes an agent durable when DurableRunner runs it; elsewhere the agent runs as without it.

    Each model request, tool call and MCP request of the agent is a step of the flowstore run. The agent and
    its toolsets need a name or id that stays the same: it is part of the keys of the steps.
    """

    engine_spec = DurabilityEngineSpec(
        engine_name="flowstore",
        durable_unit_noun="step",
        durable_container_noun="run",
        codec=JSON_CODEC,
        toolset_lifecycles={
            "function": "enter-always",
            "mcp": "enter-in-durable-unit",
            "dynamic": "enter-never",
        },
        unsupported_runtime_toolset_kinds=frozenset({"function", "mcp", "dynamic"}),
    )

    @property
    def in_durable_context(self) -> bool:
        """Whether this is the code of a durable run, outside its steps."""
        return current_execution.get() is not None

    def get_default_run_id(self) -> str | None:
        """The id of the flowstore run; further agent runs in it are numbered."""
        execution = current_execution.get()
        return None if execution is None else execution.next_agent_run_id()

    def get_default_conversation_id(self, run_id: str) -> str | None:
        """An id derived from the run id, so that a resumed run keeps it."""
        return conversation_id_from_run_id(run_id) if self.in_durable_context else None

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        """The time at which the agent run began, also after it was resumed."""
        execution = current_execution.get()
        if execution is None:
            return None
        if run_id == str(execution.run.run_id):
            return execution.run.started_at

        async def now() -> object:
            return datetime.now(UTC).isoformat()

        key = execution.new_key(f"{self.name}__run_start_time {run_id}")
        return datetime.fromisoformat(str(await execution.step(key, "run_start_time", now)))

    def get_durable_operation_backend(self) -> DurableOperationBackend[None]:
        """The backend that executes operations as steps of the current run."""
        return _Backend(
            agent_name=self.name,
            default_model_id=self.default_model_id,
            config=RoleBasedOperationConfig(model=None, event=None, capability=None, tool=None),
        )


class _Backend(JournalCallableOperationBackend[None]):
    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: None,
    ) -> object:
        execution = current_execution.get()
        if execution is None:
            return await body()
        context = next((part for part in cache_key if isinstance(part, RunContext)), None)
        if context is not None:
            # Parallel tool calls begin in any order, so their keys must not depend on it.
            if context.tool_call_id is not None:
                name = f"{name} {context.tool_call_id}"
            if context.run_id is not None and context.run_id != str(execution.run.run_id):
                name = f"{name} in {context.run_id}"
        return await execution.step(execution.new_key(name), type(operation_id).__name__, body)
