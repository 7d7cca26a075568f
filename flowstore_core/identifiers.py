"""New run ids that sort by time, which keeps a store's indexes dense as it grows."""

from __future__ import annotations

import secrets
import threading
import time
from uuid import UUID

_lock = threading.Lock()
_last = 0


def new_run_id() -> UUID:
    """A UUID of version 7 (RFC 9562): 48 bits of Unix milliseconds, then randomness.

    Ids made by one process rise strictly, also within one millisecond and when the clock steps back.
    """
    global _last
    with _lock:
        # 60 bits: milliseconds, then a 12-bit fraction of one (RFC 9562, 6.2, method 3).
        now = (time.time_ns() << 12) // 1_000_000
        _last = max(now, _last + 1)
        moment = _last
    value = (moment >> 12) << 80 | 0x7 << 76 | (moment & 0xFFF) << 64
    return UUID(int=value | 0b10 << 62 | secrets.randbits(62))
