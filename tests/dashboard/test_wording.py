"""The wording of pages: excerpts of texts, ages, and remedies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from flowstore_dashboard.health import split_remedy
from flowstore_dashboard.wording import MAX_PAGE_TEXT, MAX_TEXT, TextBudget, age

NOW = datetime(2026, 3, 14, 12, tzinfo=UTC)


def test_a_text_is_shown_with_indentation_and_unchanged_tokens() -> None:
    text = '{"a":1.10,"b":[1e400,{"c":"x\\"{,}"}],"d":{},"a":[]}'
    shown = TextBudget().excerpt(text)
    assert shown.text == (
        '{\n  "a": 1.10,\n  "b": [\n    1e400,\n    {\n      "c": "x\\"{,}"\n    }\n  ],\n'
        '  "d": {},\n  "a": []\n}'
    )
    for other in ("not json", "1.50", '"text"', "{", "[" * 100_000):
        assert TextBudget().excerpt(other).text == other[:MAX_TEXT]


def test_the_texts_of_a_page_are_bounded() -> None:
    budget = TextBudget()
    excerpts = [budget.excerpt("x" * 30_000) for _ in range(1000)]
    assert excerpts[0].text == "x" * MAX_TEXT
    assert (excerpts[0].length, excerpts[0].is_cut) == (30_000, True)
    assert sum(len(one.text) for one in excerpts) < MAX_PAGE_TEXT + 1000 * 201


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (NOW - timedelta(days=3), "3 d ago"),
        (NOW - timedelta(minutes=61), "1 h ago"),
        (NOW, "just now"),
        (NOW + timedelta(seconds=90), "in 1 min"),
    ],
)
def test_ages(moment: datetime, text: str) -> None:
    assert age(moment, NOW) == text


def test_remedies_are_split_into_words_and_a_command() -> None:
    assert split_remedy("flowstore doctor --fix") == ("", "flowstore doctor --fix")
    assert split_remedy("start workers; for all queues: flowstore queues") == (
        "start workers; for all queues",
        "flowstore queues",
    )
    assert split_remedy("set fsync = on") == ("set fsync = on", "")
