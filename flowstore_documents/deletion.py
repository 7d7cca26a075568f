"""The deletion of a whole space, for ``Backend.scratch``."""

from __future__ import annotations

from flowstore_core import StoreUnavailableError
from flowstore_documents.space import MAX_KEY_BYTES, Change, KeyValueSpace, MaybeApplied, NotApplied, Range

AT_ONCE = 1_000
"""Maximum number of keys that one commit deletes: a large deletion slows some servers down for all their
users."""


async def delete_all_keys(space: KeyValueSpace) -> None:
    """Delete every key of a space that no store uses. Raises StoreUnavailableError; then some may be left."""
    limit = space.limits.writes
    count = min(AT_ONCE, limit * space.limits.changes, space.limits.request_bytes // MAX_KEY_BYTES)
    first = Range(b"", b"\xff", count, keys_only=True)
    try:
        while keys := [key for key, _ in (await space.read((), [first])).pages[0].items]:
            await space.commit(
                [Change(deletes=keys[start : start + limit]) for start in range(0, len(keys), limit)]
            )
    except (NotApplied, MaybeApplied) as error:
        raise StoreUnavailableError(f"the keys were not deleted: {error or 'no answer'}") from None
