"""A worker process whose clock is wrong: ``python -P .../skewed_worker.py SECONDS`` (see worker.py).

Shifts the clock of Python, so it must run before any other module reads the clock or imports ``datetime``.
Monotonic clocks, and clocks that compiled code reads itself, stay right.
"""

from __future__ import annotations

import datetime as datetime_module
import sys
import time
from typing import Any

_REAL = datetime_module.datetime


class _Kind(type(_REAL)):  # type: ignore[misc]
    """Makes every datetime an instance of the shifted class: compiled code makes plain ones."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _REAL)


def shift_clocks(seconds: float) -> None:
    """Let this process believe that it is so many seconds later."""
    offset, nanoseconds = datetime_module.timedelta(seconds=seconds), int(seconds * 1_000_000_000)

    class Shifted(_REAL, metaclass=_Kind):
        # No larger than the class that compiled modules expect.
        __slots__ = ()

        @classmethod
        def now(cls, tz: datetime_module.tzinfo | None = None) -> Any:
            return _REAL.now(tz) + offset

        @classmethod
        def utcnow(cls) -> Any:
            return _REAL.now(datetime_module.UTC).replace(tzinfo=None) + offset

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    Shifted.__name__ = Shifted.__qualname__ = "datetime"
    Shifted.__module__ = "datetime"
    read, read_ns, read_clock, read_clock_ns = (
        time.time,
        time.time_ns,
        time.clock_gettime,
        time.clock_gettime_ns,
    )
    real_time = time.CLOCK_REALTIME
    shifted: dict[str, Any] = {
        "time": lambda: read() + seconds,
        "time_ns": lambda: read_ns() + nanoseconds,
        "clock_gettime": lambda clock: read_clock(clock) + (seconds if clock == real_time else 0),
        "clock_gettime_ns": lambda clock: read_clock_ns(clock) + (nanoseconds if clock == real_time else 0),
    }
    for name in ("gmtime", "localtime", "ctime"):
        convert = getattr(time, name)
        shifted[name] = lambda when=None, convert=convert: convert(time.time() if when is None else when)
    for name, function in shifted.items():
        setattr(time, name, function)
    datetime_module.datetime = Shifted  # type: ignore[misc]


def main() -> None:
    shift_clocks(float(sys.argv[1]))
    import asyncio
    import contextlib

    from flowstore_conformance import worker

    # The harness may end during a phase.
    with contextlib.suppress(EOFError):
        asyncio.run(worker.main())


if __name__ == "__main__":
    main()
