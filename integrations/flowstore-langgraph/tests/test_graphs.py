"""Graphs of LangGraph on the saver: runs, interrupts, histories, and crashes."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from flowstore_langgraph import FlowstoreSaver
from langgraph.channels import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

EXAMPLE = Path(__file__).parents[1] / "examples" / "survive_a_crash.py"
CONFIG: Any = {"configurable": {"thread_id": "thread 1"}}


class State(TypedDict, total=False):
    names: Annotated[list[str], operator.add]
    answer: str


def _ask(state: State) -> State:
    return {"names": ["ask"], "answer": interrupt("who?")}


def _graph() -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(State)
    graph.add_node("begin", lambda state: {"names": ["begin"]})
    graph.add_node("ask", _ask)
    graph.add_edge(START, "begin")
    graph.add_edge("begin", "ask")
    graph.add_edge("ask", END)
    return graph


def test_a_graph_that_waits_for_an_answer(url: str) -> None:
    with FlowstoreSaver.from_url(url) as saver:
        result = _graph().compile(checkpointer=saver).invoke({"names": []}, CONFIG)
        assert [one.value for one in result["__interrupt__"]] == ["who?"]
        # Another object knows the thread from the store alone.
        app = _graph().compile(checkpointer=saver)
        assert app.get_state(CONFIG).next == ("ask",)
        assert app.invoke(Command(resume="me"), CONFIG) == {"names": ["begin", "ask"], "answer": "me"}
        history = list(app.get_state_history(CONFIG))
        assert [one.next for one in history] == [(), ("ask",), ("begin",), ("__start__",)]
        assert [one.values.get("names") for one in history[:2]] == [["begin", "ask"], ["begin"]]
        assert len(list(app.get_state_history(CONFIG, limit=2))) == 2


async def test_an_awaited_graph(url: str) -> None:
    async with FlowstoreSaver.from_url(url) as saver:
        app = _graph().compile(checkpointer=saver)
        await app.ainvoke({"names": []}, CONFIG)
        assert (await app.ainvoke(Command(resume="me"), CONFIG))["answer"] == "me"
        history = [one async for one in app.aget_state_history(CONFIG)]
        assert len(history) == 4
        # An older state is the beginning of another future.
        forked = await app.aupdate_state(history[1].config, {"names": ["forked"]})
        assert (await app.aget_state(forked)).values["names"] == ["begin", "forked"]


def _append(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(name for write in writes for name in write)]


class DeltaState(TypedDict, total=False):
    names: Annotated[list[str], DeltaChannel(_append)]


def test_pruning_keeps_what_a_delta_channel_is_rebuilt_from(url: str) -> None:
    graph = StateGraph(DeltaState)
    graph.add_node("one", lambda state: {"names": ["one"]})
    graph.add_edge(START, "one")
    graph.add_edge("one", END)
    with FlowstoreSaver.from_url(url) as saver:
        app = graph.compile(checkpointer=saver)
        for _ in range(3):
            app.invoke({"names": ["in"]}, CONFIG)
        before = app.get_state(CONFIG).values
        assert before == {"names": ["in", "one"] * 3}
        saver.prune(["thread 1"])
        assert app.get_state(CONFIG).values == before


@pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
def test_a_killed_process_goes_on_where_it_was(url: str, tmp_path: Path) -> None:
    def run() -> tuple[int, list[str]]:
        command = [sys.executable, EXAMPLE, url]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=140)
        return done.returncode, done.stdout.splitlines()

    assert run() == (-9, ["charging the card", "packing ... the process is killed"])
    end = "{'charged': '20 euros', 'packed': 'one parcel', 'sent': 'by post'}"
    assert run() == (0, ["packing", "sending", end])
