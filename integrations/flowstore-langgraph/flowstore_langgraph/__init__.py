"""LangGraph checkpoints in a flowstore store: a URL selects the database."""

from flowstore_langgraph.saver import FlowstoreSaver

__all__ = ["FlowstoreSaver"]
