"""Agents of the tests, with model and tools that append to a file: one line for each execution."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from flowstore_pydantic_ai import FlowstoreDurability
from pydantic_ai import Agent
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.tools import DeferredToolRequests, RunContext


class Log:
    """A file that several processes append to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{line}\n")

    @property
    def lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []


def tool_returns(messages: list[ModelMessage]) -> list[object]:
    return [part.content for one in messages for part in one.parts if isinstance(part, ToolReturnPart)]


def order_agent(log: Log, *, charged: asyncio.Event | None = None) -> Agent[None, str]:
    """Charges, packs two items in parallel, and says so: three model requests, three tool calls.

    The first charge waits for ``charged``.
    """

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        returns = tool_returns(messages)
        log.append(f"model {len(returns)}")
        if not returns:
            return ModelResponse(parts=[ToolCallPart("charge", {"euros": 20})])
        if len(returns) == 1:
            return ModelResponse(parts=[ToolCallPart("pack", {"item": item}) for item in ("book", "pen")])
        return ModelResponse(parts=[TextPart(", ".join(map(str, returns)))])

    agent = Agent(FunctionModel(respond), name="orders", capabilities=[FlowstoreDurability()])

    @agent.tool_plain
    async def charge(euros: int) -> str:
        log.append(f"charge {euros}")
        if charged is not None and log.lines.count(f"charge {euros}") == 1:
            await charged.wait()
        return f"charged {euros}"

    @agent.tool_plain
    async def pack(item: str) -> str:
        # Parallel calls end in another order than they begin.
        await asyncio.sleep(0.02 if item == "book" else 0)
        log.append(f"pack {item}")
        return f"packed {item}"

    return agent


ORDER = sorted(["model 0", "charge 20", "model 1", "pack pen", "pack book", "model 3"])
"""The lines of one execution of the order, sorted: the parallel calls end in any order."""
ORDER_CHARGED_TWICE = sorted([*ORDER, "charge 20"])
ORDER_OUTPUT = "charged 20, packed book, packed pen"


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the time-out of the test is the limit."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


def asked(log: Log) -> list[tuple[str, str]]:
    """The tokens that were handed out, each with the id of the tool call that it is for."""
    asks = [line.split(" ") for line in log.lines if line.startswith("ask ")]
    return [(token, call) for _, token, call in asks]


def ask_in_file(log: Log) -> Callable[..., None]:
    """Hands out the token with the id of the tool call that waits for approval."""

    def ask(context: RunContext[None], requests: DeferredToolRequests, token: str) -> None:
        [call] = requests.approvals
        log.append(f"ask {token} {call.tool_call_id}")

    return ask


def refund_agent(
    log: Log, ask: Callable[..., object], *, count: int = 1, timeout: timedelta | None = None
) -> Agent[None, str]:
    """Refunds 20 euros ``count`` times, each after an approval."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        returns = tool_returns(messages)
        log.append(f"model {len(returns)}")
        if len(returns) < count:
            return ModelResponse(parts=[ToolCallPart("refund", {"euros": 20})])
        return ModelResponse(parts=[TextPart(", ".join(map(str, returns)))])

    agent = Agent(
        FunctionModel(respond),
        name="refunds",
        capabilities=[FlowstoreDurability(), RequestInput(ask, timeout=timeout)],  # type: ignore[arg-type]
    )

    @agent.tool_plain(requires_approval=True)
    def refund(euros: int) -> str:
        log.append(f"refund {euros}")
        return f"approved: refunded {euros}"

    return agent
