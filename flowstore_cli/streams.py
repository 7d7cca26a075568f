"""Guards for closed, full or broken standard streams, so that the command completes its work."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO


class Descriptor(io.RawIOBase):
    """A writable file descriptor that keeps its first error and discards all output after it."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left and self.error is None:
            try:
                written = self._raw.write(left)
                if written is None:
                    # The descriptor is non-blocking, and its reader is slow.
                    select.select((), (self._raw,), ())
                else:
                    left = left[written:]
            except OSError as error:
                self.error = error
        return size


@contextmanager
def guarded_streams() -> Iterator[Descriptor | None]:
    """Replace the standard streams by ones whose writes never raise.

    Yields the descriptor behind standard output, or None if a caller has replaced it by another object.
    A closed stream reads and writes the null device.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _reopen_closed()
    stdin = sys.stdin
    with ExitStack() as stack:
        if stdin is None:
            sys.stdin = stack.enter_context(open(os.devnull, encoding="utf-8"))
        stderr, _ = _guard(stack, sys.stderr)
        stdout, descriptor = _guard(stack, sys.stdout)
        stack.enter_context(redirect_stderr(stderr))
        stack.enter_context(redirect_stdout(stdout))
        try:
            yield descriptor
        finally:
            sys.stdin = stdin


def _reopen_closed() -> None:
    """Open the null device in place of closed descriptors.

    Otherwise the next opened file, such as the database, becomes a standard stream of child processes.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() returns the lowest free descriptor, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _guard(stack: ExitStack, stream: TextIO | None) -> tuple[TextIO, Descriptor | None]:
    if stream is None:
        return stack.enter_context(open(os.devnull, "w", encoding="utf-8")), None
    if not isinstance(stream, io.TextIOWrapper):
        return stream, None
    # A character outside the terminal's encoding must not end the command.
    stream.reconfigure(errors="backslashreplace")
    # An unbuffered stream has no buffer around its descriptor.
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):
        return stream, None
    descriptor = Descriptor(raw)
    buffer: Any = descriptor if raw is stream.buffer else io.BufferedWriter(descriptor)
    guarded = io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    stack.callback(guarded.flush)
    return guarded, descriptor
