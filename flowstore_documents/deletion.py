"""The deletion of a whole space, for ``Backend.scratch`` and ``clear_scratch``."""

from __future__ import annotations

from flowstore_core import StoreUnavailableError
from flowstore_documents.clock_register import KEY as CLOCK
from flowstore_documents.keys import SLOTS
from flowstore_documents.space import MAX_KEY_BYTES, Change, KeyValueSpace, MaybeApplied, NotApplied, Range

AT_ONCE = 1_000
"""Maximum number of keys that one commit deletes: a large deletion slows some servers down for all their
users."""


async def delete_all_keys(space: KeyValueSpace) -> None:
    """Delete every key of a space that no store uses. Raises StoreUnavailableError; then some may be left."""
    await _delete(space, b"", b"\xff")


async def clear_keys(space: KeyValueSpace) -> None:
    """Delete what stores have stored, for ``Backend.clear_scratch``. Raises as ``delete_all_keys`` does.

    The clock and the slots stay: without them, the next changes of a store that is open would be refused.
    """
    await _delete(space, b"", CLOCK)
    await _delete(space, CLOCK + b"\x00", SLOTS)


async def _delete(space: KeyValueSpace, start: bytes, end: bytes) -> None:
    limit = space.limits.writes
    count = min(AT_ONCE, limit * space.limits.changes, space.limits.request_bytes // MAX_KEY_BYTES)
    first = Range(start, end, count, keys_only=True)
    try:
        while keys := [key for key, _ in (await space.read((), [first])).pages[0].items]:
            await space.commit([Change(deletes=keys[at : at + limit]) for at in range(0, len(keys), limit)])
    except (NotApplied, MaybeApplied) as error:
        raise StoreUnavailableError(f"the keys were not deleted: {error or 'no answer'}") from None
