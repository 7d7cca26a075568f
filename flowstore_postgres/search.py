"""Searching runs on PostgreSQL: the exact condition, and the index in front of it (QRY-2, migration 3)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial

from flowstore_core import FlowStoreError
from flowstore_core.runs import SEARCHED_BYTES
from flowstore_postgres.connection import Transaction
from flowstore_postgres.database import Database
from flowstore_postgres.migrate import GATHER_TEXTS, GATHERED, HAS_INDEX

log = logging.getLogger("flowstore_postgres")

TOLERATED = 64
"""So many ended runs that the index does not hold yet cost a search about a millisecond."""
COUNT_LEFT_OUT = f"(SELECT count(*) FROM (SELECT FROM {{schema}}.unsearched LIMIT {TOLERATED + 1}) few)"

# Every run that can match: those whose text is like all patterns, and those whose text may be old.
CANDIDATES = """
(SELECT * FROM {schema}.runs WHERE run_id IN (
    SELECT run_id FROM {schema}.run_texts WHERE {like}
    UNION ALL SELECT run_id FROM {schema}.unsearched
    UNION ALL SELECT run_id FROM {schema}.runs WHERE status = 'Running'
))
"""

# Bytes, not characters: UTF-8 needs no decoding to be searched. lower() under "C" folds ASCII alone.
_SHORT = 'position({needle} IN lower({text} COLLATE "C")) > 0'
_LONG = (
    "position(convert_to({needle}, 'UTF8') IN "
    f"substring(convert_to(lower(left({{text}}, {SEARCHED_BYTES}) COLLATE \"C\"), 'UTF8') "
    f"FROM 1 FOR {SEARCHED_BYTES})) > 0"
)


def patterns(needle: str) -> list[str]:
    """What the text of a run that matches a folded needle is LIKE; nothing where no index can help.

    The extension folds letters by the rules of the database's language, so only ASCII is left to it: that
    means the same to it and to QRY-2, whatever stands around. It can look up what has three letters or
    digits in a row.
    """
    if re.search("[a-z0-9]{3}", needle) is None:
        return []
    parts = re.findall("[\x01-\x7f]+", needle)
    return ["%" + re.sub(r"([%_\\])", r"\\\1", part) + "%" for part in parts]


def candidates(like: Sequence[str]) -> str:
    """The runs whose texts match all patterns, given as expressions, and those whose texts may be old."""
    return CANDIDATES.replace("{like}", " AND ".join(f"text LIKE {pattern}" for pattern in like))


def search_condition(needle: str) -> str:
    """Whether the run ``r`` matches a folded needle, to the letter of QRY-2."""

    def short(text: str) -> str:
        return _SHORT.replace("{needle}", needle).replace("{text}", text)

    def long(text: str) -> str:
        return _LONG.replace("{needle}", needle).replace("{text}", text)

    run = " OR ".join(
        short(text) for text in ("r.run_id::text", "r.flow_name", "r.trigger_key", "r.status", "r.job_id")
    )
    # What get_run_detail shows: the attempts of a reset step are not shown, so not found either.
    step = " OR ".join((short("s.step_key"), long("s.error_message"), long("s.output_json")))
    attempt = " OR ".join((long("a.error_message"), long("a.output_json")))
    return f"""(coalesce({run}, false)
        OR EXISTS (SELECT FROM {{schema}}.steps s
                   WHERE s.run_id = r.run_id AND s.status IS NOT NULL AND ({step}))
        OR EXISTS (SELECT FROM {{schema}}.attempts a JOIN {{schema}}.steps s USING (run_id, step_key)
                   WHERE a.run_id = r.run_id AND s.status IS NOT NULL AND ({attempt})))"""


async def is_indexed(database: Database) -> bool:
    return bool((await database.read_row(HAS_INDEX))["indexed"])


async def gather(most: int, transaction: Transaction) -> int:
    """Add some ended runs to the index; how many."""
    return int((await transaction.row(GATHER_TEXTS, most))[0])


async def gather_some(database: Database) -> None:
    """Add some ended runs to the index if that can be done now."""
    try:
        await database.transaction("gather_texts", partial(gather, GATHERED))
    except FlowStoreError as error:
        # They were found without it, and will be again.
        log.debug("no texts were gathered: %s", error)
