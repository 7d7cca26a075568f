"""Run ids that sort by creation time, which keeps the indexes of a growing store dense."""

from __future__ import annotations

import secrets
import threading
import time
from uuid import UUID

_lock = threading.Lock()
_last = 0


def new_run_id() -> UUID:
    """Create a UUID of version 7 (RFC 9562): 48 bits of Unix milliseconds, then random bits.

    The ids of one process strictly increase, also within a millisecond and when the clock steps back.
    """
    global _last
    with _lock:
        # 60 bits: milliseconds, then a 12-bit fraction of one (RFC 9562, 6.2, method 3).
        now = (time.time_ns() << 12) // 1_000_000
        _last = max(now, _last + 1)
        moment = _last
    value = (moment >> 12) << 80 | 0x7 << 76 | (moment & 0xFFF) << 64
    return UUID(int=value | 0b10 << 62 | secrets.randbits(62))
