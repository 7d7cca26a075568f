"""Stacks and tracebacks for authors of backends: only frames of the backend, without secrets.

Frames of the suite, core and the standard library do not help an author, so a trace begins at the first frame
of other code, which belongs to the backend or its driver.
"""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType

import flowstore_core
from flowstore_core import open_store
from flowstore_core.urls import parse_url
from flowstore_core.validated_store import ValidatedStore

SUITE = str(Path(__file__).parent)
CORE = str(Path(flowstore_core.__file__).parent)
STANDARD = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
INSTALLED = ("site-packages", "dist-packages")

OPERATIONS: dict[CodeType, str] = {
    method.__code__: name
    for name, method in vars(ValidatedStore).items()
    if inspect.iscoroutinefunction(method)
}
"""The code objects of the methods through which core calls a backend, with their names."""

OPEN_STORE: CodeType = inspect.unwrap(open_store).__code__


class RemoteError(Exception):
    """An exception from another process: its class, its trace and its origin."""

    def __init__(self, name: str, *, trace: str, place: str | None, operation: str | None) -> None:
        super().__init__(name)
        self.name = name
        self.trace = trace
        self.place = place
        self.operation = operation


def is_authors(filename: str) -> bool:
    """Whether a file belongs to the backend under test or to one of its dependencies."""
    if filename.startswith("<"):
        return False
    if is_suites(filename) or filename.startswith(f"{CORE}/"):
        return False
    if any(name in filename for name in INSTALLED):
        return True
    return not filename.startswith(STANDARD)


def is_suites(filename: str) -> bool:
    """Whether a file belongs to the suite itself."""
    return filename.startswith(f"{SUITE}/")


def place(filename: str, line: int | None, function: str) -> str:
    """Format a location in code."""
    return f"{'/'.join(Path(filename).parts[-2:])}:{line} in {function}"


def place_of(error: BaseException) -> str | None:
    """The innermost line of the author's code in a traceback; None if there is none."""
    if isinstance(error, RemoteError):
        return error.place
    found = [
        place(frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_authors(frame.f_code.co_filename)
    ]
    return found[-1] if found else None


def operation_of(error: BaseException) -> str | None:
    """The operation of the store that raised an exception."""
    if isinstance(error, RemoteError):
        return error.operation
    found = [
        OPERATIONS[frame.f_code]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code in OPERATIONS
    ]
    return found[-1] if found else None


def error_type(error: BaseException) -> str:
    """The class name of an exception, including one from another process."""
    return error.name if isinstance(error, RemoteError) else type(error).__name__


def trace_of(error: BaseException) -> str:
    """A traceback with the author's frames only; with all frames if none is the author's."""
    if isinstance(error, RemoteError):
        return error.trace
    formatted = traceback.TracebackException.from_exception(error)
    for one in _chain(formatted):
        one.stack = traceback.StackSummary.from_list(_without_suite(one.stack))
    return "".join(formatted.format())


def pack_error(error: BaseException) -> dict[str, str | None]:
    """The arguments of RemoteError for an exception, except the class name."""
    return {"trace": trace_of(error), "place": place_of(error), "operation": operation_of(error)}


def _chain(formatted: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    yield formatted
    for linked in (formatted.__cause__, formatted.__context__, *(formatted.exceptions or ())):
        if linked is not None:
            yield from _chain(linked)


def _without_suite(stack: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    first = next((number for number, one in enumerate(stack) if is_authors(one.filename)), None)
    if first is None:
        return list(stack)
    return [one for one in stack[first:] if not is_suites(one.filename)]


def stack_text(frames: Iterable[FrameType]) -> str:
    """Format frames, outermost first, as a traceback that begins at the author's first frame."""
    stack = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
    return "".join(traceback.StackSummary.from_list(_without_suite(stack)).format())


class Scrubber:
    """Removes the passwords of a URL from text."""

    def __init__(self, url: str) -> None:
        self._secrets = sorted(parse_url(url).secrets(), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text
