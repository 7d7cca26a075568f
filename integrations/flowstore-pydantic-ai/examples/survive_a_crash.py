"""An agent that is killed while a tool runs: ``python survive_a_crash.py URL``.

The first run kills itself. Run it again with the same URL: it goes on where it was. The model is a function,
so that the example needs no key; with a real one only the first argument of Agent changes.
"""

import asyncio
import os
import signal
import sys
from datetime import timedelta

from flowstore_pydantic_ai import DurableRunner, FlowstoreDurability
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from flowstore import open_store


def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    done = [part.content for one in messages for part in one.parts if isinstance(part, ToolReturnPart)]
    if not done:
        print("model: charge the card")
        return ModelResponse(parts=[ToolCallPart("charge", {"euros": 20})])
    if len(done) == 1:
        print("model: pack a parcel")
        return ModelResponse(parts=[ToolCallPart("pack", {})])
    print("model: done")
    return ModelResponse(parts=[TextPart(", ".join(done))])


agent = Agent(FunctionModel(respond), name="orders", capabilities=[FlowstoreDurability()])


@agent.tool_plain
def charge(euros: int) -> str:
    print(f"charging {euros} euros")
    return f"charged {euros} euros"


@agent.tool_plain
def pack() -> str:
    if not os.path.exists("was_killed"):
        open("was_killed", "w").close()
        print("packing ... killed")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    print("packing")
    return "packed one parcel"


async def main(url: str) -> None:
    async with open_store(url) as store:
        # The lease is how long the run of a dead process stays unavailable.
        runner = DurableRunner(store, lease=timedelta(seconds=5))
        result = await runner.run(agent, "Sell a book", run_id="order 7")
        print(result.output)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "sqlite:///agents.db"))
