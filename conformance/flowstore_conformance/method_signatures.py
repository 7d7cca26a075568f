"""Compare the methods of a backend's store with the Protocol, before any check calls them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from flowstore_conformance.traces import place
from flowstore_core import Capability, FlowStore
from flowstore_core.operations import (
    BASE_OPERATIONS,
    CAPABILITY_METHODS,
    KEYWORD_CAPABILITIES,
    OPERATIONS,
)

AWAITABLES = ("Awaitable", "Coroutine", "Future", "Task")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureFinding:
    """A method that core cannot call as the Protocol requires."""

    method: str
    noun: str
    """The module of core that declares the method, such as ``claims``."""
    problem: str
    remedy: str
    """A definition that fixes the problem."""
    clauses: tuple[str, ...] = ()
    """The clauses that specify the method."""
    place: str | None = None
    """The location of the definition in the backend."""
    capability: str | None = None
    """The declared capability that needs the method; None for the base protocols."""
    missing: bool = False
    """Whether the method does not exist."""
    certain: bool = True
    """Whether every call fails. A plain function may still return an awaitable."""

    @property
    def title(self) -> str:
        """The method and its problem, as a sentence."""
        return f"{self.noun}.{self.method} {self.problem}"


def compare(store: Any, capabilities: Collection[Capability]) -> tuple[SignatureFinding, ...]:
    """The signature problems of a backend's own store, in the order of the operation table."""
    names: dict[str, Capability | None] = dict.fromkeys(BASE_OPERATIONS)
    for capability in sorted(capabilities):
        names.update(dict.fromkeys(CAPABILITY_METHODS.get(capability, ()), capability))
    return tuple(
        finding for name, needs in names.items() for finding in _compare(store, name, needs, capabilities)
    )


def _compare(
    store: Any, name: str, capability: Capability | None, capabilities: Collection[Capability]
) -> Iterator[SignatureFinding]:
    declared = getattr(FlowStore, name)
    keywords = KEYWORD_CAPABILITIES.get(name, {})
    wanted = [
        one
        for one in inspect.signature(declared).parameters.values()
        if one.name != "self" and keywords.get(one.name) in (None, *capabilities)
    ]
    method = getattr(store, name, None)

    def finding(
        problem: str, remedy: str, *, certain: bool = True, missing: bool = False
    ) -> SignatureFinding:
        return SignatureFinding(
            method=name,
            noun=declared.__module__.rpartition(".")[2],
            problem=problem,
            remedy=remedy,
            clauses=OPERATIONS[name].clauses if name in OPERATIONS else (),
            place=None if missing else _defined_at(method),
            capability=None if capability is None else capability.value,
            missing=missing,
            certain=certain,
        )

    right = f"async def {name}({', '.join(_shown(wanted))})"
    if method is None:
        because = f", which the declared capability {capability} needs" if capability else ""
        yield finding(f"is missing{because}", right, missing=True)
        return
    if not callable(method):
        yield finding(f"is not a method but of type {type(method).__name__}", right)
        return
    try:
        given = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return  # For example a method written in C: its signature is unknown.
    if problems := list(_problems(wanted, given)):
        yield finding(", ".join(problems), right)
    elif not _may_be_awaited(method):
        yield finding("is not a coroutine function", right, certain=False)


def _problems(wanted: list[Parameter], given: Any) -> Iterator[str]:
    takes_any = any(one.kind is Parameter.VAR_KEYWORD for one in given.values())
    positional = [name for name, one in given.items() if one.kind is Parameter.POSITIONAL_ONLY]
    named = [
        name
        for name, one in given.items()
        if one.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]
    names = [one.name for one in wanted]
    surplus = [name for name in named if name not in names]
    for one in wanted:
        if one.name in positional:
            yield f"takes the parameter `{one.name}` by position only"
        elif one.name not in named and not takes_any:
            other = _renamed(one.name, names, named, surplus)
            if other is None:
                yield f"lacks the parameter `{one.name}`"
            else:
                surplus.remove(other)
                yield f"calls the parameter `{other}` that the protocol calls `{one.name}`"
    required = [
        name
        for name, one in given.items()
        if one.default is Parameter.empty and (name in surplus or (name in positional and name not in names))
    ]
    yield from (f"requires the parameter `{name}`, which the protocol does not have" for name in required)


def _renamed(name: str, wanted: list[str], given: list[str], surplus: list[str]) -> str | None:
    """The parameter that most likely replaces ``name``: one with a similar name or at the same position."""
    alike = difflib.get_close_matches(name, surplus, 1)
    if alike:
        return alike[0]
    number = wanted.index(name)
    same_place = given[number] if len(given) == len(wanted) else None
    return same_place if same_place in surplus else None


def _shown(wanted: list[Parameter]) -> Iterator[str]:
    """The parameters of the Protocol, without their types."""
    yield "self"
    keyword = False
    for one in wanted:
        if one.kind is Parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            yield "*"
        yield one.name if one.default is Parameter.empty else f"{one.name}={one.default!r}"


def _may_be_awaited(method: Any) -> bool:
    function = inspect.unwrap(method)
    while hasattr(function, "func"):
        function = function.func
    if inspect.iscoroutinefunction(function) or not inspect.isroutine(function):
        return True
    returns = str(getattr(function, "__annotations__", {}).get("return", ""))
    parameters = inspect.signature(function).parameters.values()
    # A function with **kwargs most likely delegates to another one.
    return any(name in returns for name in AWAITABLES) or any(
        one.kind is Parameter.VAR_KEYWORD for one in parameters
    )


def _defined_at(method: Any) -> str | None:
    code = getattr(inspect.unwrap(method), "__code__", None)
    return None if code is None else place(code.co_filename, code.co_firstlineno, code.co_name)
