"""The public conformance suite of LangGraph checkpointers."""

from __future__ import annotations

from collections.abc import AsyncIterator

from flowstore_langgraph import FlowstoreSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability


async def test_the_saver_conforms_completely(url: str) -> None:
    @checkpointer_test(name="FlowstoreSaver")
    async def new_saver() -> AsyncIterator[FlowstoreSaver]:
        async with FlowstoreSaver.from_url(url) as saver:
            yield saver

    report = await validate(new_saver)
    assert {name: result.failures for name, result in report.results.items() if not result.passed} == {}
    assert {name for name, result in report.results.items() if result.tests_passed} == {*Capability}
