"""Examples: small tests of one promise each, which share a namespace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.registry import Check, Kind, Run, check
from flowstore_core import Capability, FlowStoreError, NotSupportedError

NEEDS_EMPTY_NAMESPACE = ("QRY-", "RET-", "STP-8", "CTL-1", "CTL-3", "INP-3", "IDM-")
"""Prefixes of clauses whose examples read or delete across runs; they get a new namespace."""

_Group = tuple[str, frozenset[Capability], Kind]
_groups: dict[_Group, list[Run]] = {}
_examples: dict[str, list[Run]] = {}
"""The examples of each check, by the name of the check."""


def example(
    clause: str, *, needs: Iterable[Capability] = (), kind: Kind = Kind.EXAMPLE
) -> Callable[[Run], Run]:
    """Declare an example of a clause; its docstring states the promise that it tests.

    The examples of one clause with the same needs form one check in one namespace, because creating a
    namespace takes longer than most examples. They run in the order of their declaration. Examples of other
    clauses may have used the namespace before (but see NEEDS_EMPTY_NAMESPACE), so an example uses new runs,
    flows and keys, and tolerates other runs in global lists. It may advance the clock, which is then reset.
    """
    group = (clause, frozenset(needs), kind)

    def add(run: Run) -> Run:
        if group not in _groups:
            _groups[group] = []
            _declare(*group)
        _groups[group].append(run)
        return run

    return add


def _declare(clause: str, needs: frozenset[Capability], kind: Kind) -> None:
    async def run_all(context: CheckContext) -> None:
        await run_examples(context, _groups[clause, needs, kind])

    more = "_and_".join(sorted(needs))
    own = "examples" if kind is Kind.EXAMPLE else f"{kind}_examples"
    run_all.__name__ = f"{own}_of_{clause.lower().replace('-', '_')}{'_with_' if more else ''}{more}"
    run_all.__doc__ = CLAUSES[clause].sentence
    isolated = kind is not Kind.EXAMPLE or clause.startswith(NEEDS_EMPTY_NAMESPACE)
    check(clause, needs=needs, kind=kind, isolated=isolated)(run_all)
    _examples[run_all.__name__] = _groups[clause, needs, kind]


def examples_without_virtual_clock() -> Mapping[str, Sequence[Run]]:
    """The examples that share a namespace and need no virtual clock, by clause."""
    found: dict[str, list[Run]] = {}
    for (clause, needs, kind), runs in _groups.items():
        shared = kind is Kind.EXAMPLE and not clause.startswith(NEEDS_EMPTY_NAMESPACE)
        if shared and needs <= {Capability.LEASES}:
            found.setdefault(clause, []).extend(runs)
    return found


def single_example(grouped: Check, name: str) -> Check | None:
    """The check limited to one of its examples; None if it has no example of that name."""
    for run in _examples.get(grouped.name, ()):
        if run.__name__ == name:
            return _limited(grouped, run)
    return None


def example_names(grouped: Check) -> list[str]:
    """The names of the examples that a check runs; empty for a check that is not a group of examples."""
    return [run.__name__ for run in _examples.get(grouped.name, ())]


def _limited(grouped: Check, example: Run) -> Check:
    async def run_one(context: CheckContext) -> None:
        await run_examples(context, [example])

    sentence = " ".join((example.__doc__ or "").split())
    return replace(grouped, name=example.__name__, sentence=sentence, run=run_one)


async def run_examples(context: CheckContext, runs: Iterable[Run], *, skips_missing: bool = False) -> None:
    """Run every example and report every failure: the examples are independent.

    With ``skips_missing`` an example that calls an operation that the store lacks is skipped.
    """
    failed: list[str] = []
    cause: BaseException | None = None
    at = None if context.clock is None else context.clock.now
    for run in runs:
        try:
            await run(context)
        except ContractViolation as found:
            failed.append(f"{found.message} [{run.__name__}]")
            cause = cause or found.__cause__
        except FlowStoreError as error:
            if skips_missing and isinstance(error, NotSupportedError):
                continue
            what = f"an operation: expected no error, got {type(error).__name__}: {error}"
            failed.append(f"{what} [{run.__name__}]")
            cause = cause or error
        if context.clock is not None and at is not None:
            context.clock.now = at
    if failed:
        raise ContractViolation("\n".join(failed)) from cause
