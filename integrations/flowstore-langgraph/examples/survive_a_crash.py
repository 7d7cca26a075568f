"""A graph of three steps that is killed in the second: ``python survive_a_crash.py URL``.

The first run kills itself. Run it again with the same URL: it goes on with the second step.
"""

import os
import signal
import sys
from typing import TypedDict

from flowstore_langgraph import FlowstoreSaver
from langgraph.graph import END, START, StateGraph


class Order(TypedDict, total=False):
    charged: str
    packed: str
    sent: str


def charge(order: Order) -> Order:
    print("charging the card")
    return {"charged": "20 euros"}


def pack(order: Order) -> Order:
    if not os.path.exists("was_killed"):
        open("was_killed", "w").close()
        print("packing ... the process is killed")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    print("packing")
    return {"packed": "one parcel"}


def send(order: Order) -> Order:
    print("sending")
    return {"sent": "by post"}


def main(url: str) -> None:
    graph = StateGraph(Order)
    graph.add_node("charge", charge)
    graph.add_node("pack", pack)
    graph.add_node("send", send)
    graph.add_edge(START, "charge")
    graph.add_edge("charge", "pack")
    graph.add_edge("pack", "send")
    graph.add_edge("send", END)
    config = {"configurable": {"thread_id": "order 7"}}
    with FlowstoreSaver.from_url(url) as saver:
        app = graph.compile(checkpointer=saver)
        has_begun = saver.get_tuple(config) is not None
        # None: go on with the state that is stored.
        print(app.invoke(None if has_begun else {}, config, durability="sync"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "sqlite:///threads.db")
