"""docs/operating.md agrees with the code: fields, instruments, attributes, findings, loggers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flowstore_otel import attributes
from flowstore_otel import metrics as instruments
from flowstore_postgres import diagnosis as postgres
from flowstore_sqlite import diagnosis as sqlite

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operating.md").read_text()


def _sources() -> Iterator[str]:
    for path in sorted(ROOT.glob("flowstore_*/**/*.py")):
        yield path.read_text()


def _rows(header: str) -> list[list[str]]:
    """The rows of every table whose header row begins with ``header``."""
    rows = []
    for part in PAGE.split(f"\n| {header} |")[1:]:
        for line in part.splitlines()[2:]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    assert rows
    return rows


def _names(header: str) -> list[str]:
    return [row[0].strip("`") for row in _rows(header)]


def test_every_field_of_a_record_is_documented() -> None:
    used = {name for text in _sources() for name in re.findall(r'"(flowstore\.\w+)": ', text)}
    # This field occurs in a span's event.
    assert used | {"flowstore.calls"} == set(_names("field"))


def test_every_logger_is_documented_and_quiet() -> None:
    used = {name for text in _sources() for name in re.findall(r'getLogger\("(\w+)"\)', text)}
    assert used - {"aiosqlite"} == set(_names("logger"))
    for name in used & {path.name for path in ROOT.iterdir()}:
        handler = f'logging.getLogger("{name}").addHandler(logging.NullHandler())'
        assert handler in (ROOT / name / "__init__.py").read_text()


def test_every_attribute_is_documented() -> None:
    used = {
        value
        for name, value in vars(attributes).items()
        if name.isupper()
        and isinstance(value, str)
        and name not in ("REASON", "RESOLUTION", "QUEUE", "STATE")
    }
    assert used == set(_names("attribute"))
    for name in (attributes.REASON, attributes.RESOLUTION, attributes.QUEUE, attributes.STATE):
        assert f"`{name}`" in PAGE
    for state in instruments.STATES:
        assert f"`{state}`" in PAGE


def test_every_instrument_is_documented_with_its_kind_and_unit() -> None:
    source = Path(instruments.__file__).read_text()
    instruments_in_code = re.findall(r'create_(\w+)\(\s*"([\w.]+)",\s*unit="([^"]+)"', source)
    assert len(instruments_in_code) == 9
    rows = [[cell.strip("`") for cell in row[:3]] for row in _rows("instrument")]
    assert sorted(rows) == sorted(
        [name, kind.replace("_", " "), unit] for kind, name, unit in instruments_in_code
    )


def test_every_finding_is_documented_with_its_severity() -> None:
    documented = {row[0].strip("`"): row[1] for row in _rows("code")}
    assert len(documented) == len(_rows("code"))
    severities = dict[str, str]()
    for text in _sources():
        for code, severity in re.findall(
            r'code="([a-z-]+)",\s*(?:prevents_open=True,\s*)?severity=Severity\.(\w+)', text
        ):
            severities[code] = severity.lower()
    # The codes of these findings are composed at run time.
    for table in (*sqlite.EXPIRED_TABLES, *sqlite.ORPHAN_TABLES):
        severities[f"orphans-{table.replace('_', '-')}"] = "warning"
    severities |= {"pages-not-checked": "note", "idle-session-timeout": "note", "transaction-timeout": "note"}
    severities |= dict.fromkeys(("leases-expired", "dispatches-due", "steps-not-dispatched"), "warning")
    assert postgres.EXPIRED_TABLES == sqlite.EXPIRED_TABLES
    assert postgres.ORPHAN_TABLES.keys() == sqlite.ORPHAN_TABLES.keys()
    assert documented == severities
