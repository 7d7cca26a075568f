"""Stacks and tracebacks for the author of a backend: their own frames, without secrets.

The frames of the suite, of core, and of the standard library around them tell an author nothing. So a trace
begins at the first frame of other code, which is the backend or its driver.
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
"""The code of every call that core makes on a backend, with its name."""

OPEN_STORE: CodeType = inspect.unwrap(open_store).__code__


class RemoteError(Exception):
    """An exception of another process: its class, its trace, and where it was raised."""

    def __init__(self, name: str, *, trace: str, place: str | None, operation: str | None) -> None:
        super().__init__(name)
        self.name = name
        self.trace = trace
        self.place = place
        self.operation = operation


def is_authors(filename: str) -> bool:
    """Whether a file belongs to the backend under test or to what it uses."""
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
    """Where code stands, in a few words."""
    return f"{'/'.join(Path(filename).parts[-2:])}:{line} in {function}"


def place_of(error: BaseException) -> str | None:
    """The innermost line of the author's code that an exception passed through; None for none."""
    if isinstance(error, RemoteError):
        return error.place
    found = [
        place(frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_authors(frame.f_code.co_filename)
    ]
    return found[-1] if found else None


def operation_of(error: BaseException) -> str | None:
    """The operation of the store that an exception came from."""
    if isinstance(error, RemoteError):
        return error.operation
    found = [
        OPERATIONS[frame.f_code]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code in OPERATIONS
    ]
    return found[-1] if found else None


def error_type(error: BaseException) -> str:
    """The name of an exception's class, in whichever process it was raised."""
    return error.name if isinstance(error, RemoteError) else type(error).__name__


def trace_of(error: BaseException) -> str:
    """A traceback of the author's frames; of all frames where none is the author's."""
    if isinstance(error, RemoteError):
        return error.trace
    formatted = traceback.TracebackException.from_exception(error)
    for one in _chain(formatted):
        one.stack = traceback.StackSummary.from_list(_without_suite(one.stack))
    return "".join(formatted.format())


def pack_error(error: BaseException) -> dict[str, str | None]:
    """What RemoteError needs to know of an exception beside its class."""
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
    """Frames, outermost first, as the lines of a traceback; from the author's first frame on."""
    stack = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames)
    return "".join(traceback.StackSummary.from_list(_without_suite(stack)).format())


class Scrubber:
    """Takes the passwords of a URL out of texts."""

    def __init__(self, url: str) -> None:
        self._secrets = sorted(parse_url(url).secrets(), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text
