"""Work under a lease: done in the caller's own task, with a heartbeat beside it once it takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flowstore_replay.patience import cancel

T = TypeVar("T")


async def with_heartbeat(
    work: Awaitable[None], every: float, beat: Callable[[], Awaitable[T | None]]
) -> T | None:
    """Await work, and beat every so many seconds meanwhile; None when the work came to its end.

    The first answer of a beat that is not None cancels the work, and is returned; an error of a beat
    cancels it and is raised.
    """
    loop = asyncio.get_running_loop()
    answer: T | None = None
    failure: BaseException | None = None
    beating: asyncio.Task[None] | None = None
    scope = asyncio.timeout(None)

    async def keep_beating() -> None:
        nonlocal answer, failure
        try:
            while True:
                answer = await beat()
                if answer is not None:
                    break
                await asyncio.sleep(every)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - not swallowed: raised once the work has ended
            failure = error
        scope.reschedule(loop.time())

    def begin() -> None:
        nonlocal beating
        beating = loop.create_task(keep_beating())

    # Most work is over before its first beat, and then costs no task.
    timer = loop.call_later(every, begin)
    try:
        async with scope:
            await work
    except TimeoutError:
        if not scope.expired():
            raise
        if failure is not None:
            raise failure from None
        return answer
    finally:
        timer.cancel()
        if beating is not None:
            await cancel(beating)
    return None
