"""The tags of a run: keys with values by which an application finds its runs (TAG)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, TypeAlias
from uuid import UUID

from flowstore_core.errors import ConflictError

MAX_TAGS = 32
"""Maximum number of tags of a run (TAG-1)."""

RunTags: TypeAlias = tuple[tuple[str, str], ...]
"""The tags of a record: (key, value), ordered by key."""

NO_TAGS: Mapping[str, str] = MappingProxyType({})
"""The default of the keyword ``tags`` in a backend: core passes tags only where there are some."""


class Tags(Protocol):
    """Capability TAGS; also the keyword ``tags`` of start_run, trigger_run, get_runs and get_runs_page."""

    async def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        """Merge tags into those of a run, atomically; None removes a key, other keys stay (TAG-2).

        Sets at most 32 keys and removes at most 32. Allowed on a terminal run. A repeated call changes
        nothing.

        Raises RunNotFoundError, and ConflictError, changing nothing, if the run would have more than 32 tags.
        """
        ...


def order_tags(tags: Mapping[str, str]) -> RunTags:
    """The form of records (TAG-1)."""
    return tuple(sorted(tags.items()))


def merge_tags(run_id: UUID, tags: RunTags, changes: Mapping[str, str | None]) -> RunTags:
    """The tags of a run after set_tags (TAG-2). Raises ConflictError."""
    merged = {key: value for key, value in {**dict(tags), **changes}.items() if value is not None}
    if len(merged) > MAX_TAGS:
        raise ConflictError(
            f"run {run_id} would have {len(merged)} tags; at most {MAX_TAGS} are allowed", run_id=run_id
        )
    return order_tags(merged)


def encode_tags(tags: RunTags) -> str | None:
    """A JSON object, as a backend may store it; None without tags."""
    return json.dumps(dict(tags), ensure_ascii=False) if tags else None


def decode_tags(stored: str | None) -> RunTags:
    """The inverse of encode_tags; the keys of the object may come in any order."""
    return order_tags(json.loads(stored)) if stored else ()
