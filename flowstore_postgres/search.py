"""Searches of runs on PostgreSQL: the exact condition of QRY-2, and the trigram index of migration 3."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial

from flowstore_core import FlowStoreError
from flowstore_core.runs import SEARCHED_BYTES
from flowstore_postgres.database import Database
from flowstore_postgres.transactions import Transaction

log = logging.getLogger("flowstore_postgres")

HAS_INDEX = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgname = 'search_ended'
               AND tgrelid = $name${schema}.runs$name$::regclass) AS indexed
"""
INDEX_RUNS = "SELECT {schema}.gather_texts($1)"
INDEX_BATCH = 256
"""Maximum number of ended runs that one transaction adds to the index."""
MAX_UNINDEXED = 64
"""A search adds runs to the index beyond this number; this many cost it about a millisecond."""
REINDEX_THRESHOLD = 20_000
"""With this many ended runs outside of the index, a migration rebuilds it, and the doctor reports them."""
COUNT_UNINDEXED = f"SELECT count(*) FROM (SELECT FROM {{schema}}.unsearched LIMIT {REINDEX_THRESHOLD}) few"
COUNT_UNINDEXED_CAPPED = (
    f"(SELECT count(*) FROM (SELECT FROM {{schema}}.unsearched LIMIT {MAX_UNINDEXED + 1}) few)"
)

# Every run that can match: runs whose indexed text matches all patterns, and runs whose text may be outdated.
MATCH_CANDIDATES = """
(SELECT * FROM {schema}.runs WHERE run_id IN (
    SELECT run_id FROM {schema}.run_texts WHERE {like}
    UNION ALL SELECT run_id FROM {schema}.unsearched
    UNION ALL SELECT run_id FROM {schema}.runs WHERE status = 'Running'
))
"""

# Compares bytes: a search in UTF-8 needs no decoding. lower() under "C" folds only ASCII.
_SHORT = 'position({needle} IN lower({text} COLLATE "C")) > 0'
_LONG = (
    "position(convert_to({needle}, 'UTF8') IN "
    f"substring(convert_to(lower(left({{text}}, {SEARCHED_BYTES}) COLLATE \"C\"), 'UTF8') "
    f"FROM 1 FOR {SEARCHED_BYTES})) > 0"
)


def patterns(needle: str) -> list[str]:
    """The LIKE patterns of a folded needle for the index; empty where the index cannot help.

    pg_trgm folds letters by the rules of the database's language, so the patterns contain only the needle's
    ASCII parts, for which those rules agree with QRY-2. The index needs three letters or digits in a row.
    """
    if re.search("[a-z0-9]{3}", needle) is None:
        return []
    parts = re.findall("[\x01-\x7f]+", needle)
    return ["%" + re.sub(r"([%_\\])", r"\\\1", part) + "%" for part in parts]


def match_candidates(like: Sequence[str]) -> str:
    """A subquery for the runs that can match; ``like`` are SQL expressions for the patterns."""
    return MATCH_CANDIDATES.replace("{like}", " AND ".join(f"text LIKE {pattern}" for pattern in like))


def search_condition(needle: str) -> str:
    """The SQL condition that run ``r`` matches a folded needle, exactly as QRY-2 defines it."""

    def short(text: str) -> str:
        return _SHORT.replace("{needle}", needle).replace("{text}", text)

    def long(text: str) -> str:
        return _LONG.replace("{needle}", needle).replace("{text}", text)

    run = " OR ".join(
        short(text) for text in ("r.run_id::text", "r.flow_name", "r.trigger_key", "r.status", "r.job_id")
    )
    # The attempts of a reset step are absent from get_run_detail, so a search ignores them.
    step = " OR ".join((short("s.step_key"), long("s.error_message"), long("s.output_json")))
    attempt = " OR ".join((long("a.error_message"), long("a.output_json")))
    return f"""(coalesce({run}, false)
        OR EXISTS (SELECT FROM {{schema}}.steps s
                   WHERE s.run_id = r.run_id AND s.status IS NOT NULL AND ({step}))
        OR EXISTS (SELECT FROM {{schema}}.attempts a JOIN {{schema}}.steps s USING (run_id, step_key)
                   WHERE a.run_id = r.run_id AND s.status IS NOT NULL AND ({attempt})))"""


async def is_indexed(database: Database) -> bool:
    return bool((await database.read_row(HAS_INDEX))["indexed"])


async def index_batch(limit: int, transaction: Transaction) -> int:
    """Add up to ``limit`` ended runs to the index and return their number."""
    return int((await transaction.row(INDEX_RUNS, limit))[0])


async def index_some(database: Database) -> None:
    """Try to add a batch of ended runs to the index."""
    try:
        await database.transaction("gather_texts", partial(index_batch, INDEX_BATCH))
    except FlowStoreError as error:
        # A search finds them without the index too.
        log.debug("no runs were added to the index: %s", error)
