"""The documents of the toolkit as JSON: what is read is what was written, and the size of a text is known."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import DecodeError, Struct

from flowstore_core import RunStatus, StepStatus
from flowstore_core.timeseries import EARLIEST, LATEST
from flowstore_documents import SpaceLimits, documents
from flowstore_documents.codec import decode, encode, json_bytes
from flowstore_documents.documents import Claim, Dispatch, EventDocument, RunDocument, StepDocument, Waiter
from flowstore_documents.texts import INLINE_SHARE, StagedTexts

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)
KINDS = [
    kind
    for name, kind in inspect.getmembers(documents, inspect.isclass)
    if issubclass(kind, Struct) and name.endswith("Document")
]
# Core lets through neither U+0000 nor lone surrogates.
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
ODD = ("\x01\x1f", "\x7f\x80\x85", "\u2028\u2029", "\ufeff\uffff\U0010ffff", '"\\/', "\b\t\n\f\r")
TEXTS = st.text(CHARACTERS, max_size=20) | st.sampled_from(ODD)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: st.integers(0, 2**63 - 1),
    bool: st.booleans(),
    NoneType: st.none(),
    datetime: st.sampled_from([EARLIEST, LATEST]) | st.datetimes(timezones=st.just(UTC)),
    UUID: st.uuids(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """The values that a field of this type may have."""
    if hint in VALUES:
        return VALUES[hint]
    if isinstance(hint, UnionType):
        return st.one_of(*map(values, get_args(hint)))
    if issubclass(hint, StrEnum):
        return st.sampled_from(hint)
    return st.builds(hint, **{name: values(field) for name, field in get_type_hints(hint).items()})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
# A machine that stalls may take long to draw a document.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_document_round_trips(kind: type[Struct], data: st.DataObject) -> None:
    document = data.draw(values(kind))
    written = encode(document)
    found = decode(kind, written)
    assert found == document
    assert encode(found) == written
    # It is JSON for any reader, in the order of the fields.
    names = list(json.loads(written))
    assert names == [name for name in kind.__struct_fields__ if name in names]


def test_the_documentation_shows_a_document() -> None:
    document = StepDocument(
        StepStatus.RUNNING, first_started_at=NOW, attempt=1, step_type="http", started_at=NOW
    )
    assert encode(document).decode() in (ROOT / "docs" / "document-toolkit.md").read_text().splitlines()


def test_a_document_is_readable() -> None:
    document = RunDocument(UUID(int=7), "orders", "manual", NOW, trigger_data='{"id": 1}')
    assert encode(document) == (
        b'{"flow_id":"00000000-0000-0000-0000-000000000007","flow_name":"orders","trigger_key":"manual",'
        b'"started_at":"2026-03-14T09:26:53.589793Z","trigger_data":"{\\"id\\": 1}"}'
    )


def test_a_field_with_its_default_is_left_out_and_an_unknown_field_is_ignored() -> None:
    assert encode(StepDocument(step_type="".join([]), status=None, attempt=int("0"))) == b"{}"
    assert encode(RunDocument(UUID(int=7), "f", "t", EARLIEST, RunStatus("Running"))).count(b"status") == 0
    assert decode(StepDocument, b'{"colour":{"red":1},"attempt":2}') == StepDocument(attempt=2)


def test_a_time_keeps_its_microseconds_in_every_year() -> None:
    for moment in (EARLIEST, LATEST, NOW, NOW.replace(microsecond=1), NOW.replace(microsecond=0)):
        claim = decode(Claim, encode(Claim("token", moment)))
        assert (claim.claimed_at, claim.claimed_at.tzinfo) == (moment, UTC)


SHIFTED = """
import sys
from flowstore_conformance.skewed_worker import shift_clocks
shift_clocks(3_600)
from datetime import UTC, datetime
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import EventDocument, StepDocument
document = decode(StepDocument, sys.argv[1].encode())
assert document.started_at == datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)
assert type(document.started_at) is datetime
event = EventDocument(datetime(1, 1, 2, tzinfo=UTC), "x")
sys.stdout.buffer.write(encode(document) + encode(event))
"""


def test_a_process_that_replaces_the_class_of_times_reads_and_writes_the_same() -> None:
    step = encode(StepDocument(started_at=NOW, claim=Claim("token", NOW)))
    event = encode(EventDocument(EARLIEST, "x"))
    command = [sys.executable, "-c", SHIFTED, step.decode()]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout == step + event


@given(TEXTS)
@example('\x01\n"\\\x7f\u2028')
def test_the_size_of_a_text_is_its_size_in_a_document(text: str) -> None:
    assert json_bytes(text) == len(encode(Waiter(text, NOW))) - len(encode(Waiter("", NOW))) + len('""')
    assert json_bytes(text) <= len(text) * 6 + len('""')


def test_a_full_document_fits_into_one_value() -> None:
    """Every text of a step as long as an inline text may be, every name with the costliest characters."""
    limits = SpaceLimits()
    texts = StagedTexts(limits)
    inline = "\x01" * (limits.value_bytes // INLINE_SHARE // 6)
    text = texts.put(inline)
    assert text == inline
    name, job_id = "\x01" * 256, "\x01" * 1_024
    document = StepDocument(
        StepStatus.RUNNING, True, NOW, name, 2**63, name, text, text, text, job_id, NOW, NOW
    )
    document.claim = Claim(name, NOW, name, NOW)
    document.dispatch = Dispatch(name, NOW, NOW, job_id, name, 9, name, text)
    document.waiter = Waiter(name, NOW, NOW, NOW, text, NOW)
    assert len(encode(document)) < limits.value_bytes


@pytest.mark.parametrize("behind", [b"{}", b"x", b"\0"])
def test_a_document_with_other_data_behind_it_is_refused(behind: bytes) -> None:
    with pytest.raises(DecodeError, match="trailing"):
        decode(StepDocument, encode(StepDocument(status=StepStatus.RUNNING)) + behind)
