"""Source mutants: copies of a SQL backend with one fault in its source each, which the suite must find.

``tests/mutants`` overrides methods of an open store. A source mutant replaces a piece of the source instead,
so it reaches SQL text, transactions, batches, indexes and migrations. Its author has not read the checks of
the suite. A proof, which passes on the correct code and fails on the mutant, shows that the fault is visible
through the public API::

    @source_mutant(
        "postgresql",
        kind="time",
        clauses=("CLM-6",),
        changes=[("flowstore_postgres/claims.py", "claim_expires_at <= began", "claim_expires_at < began")],
    )
    async def lease_blocks_at_its_end(url: str) -> None:
        \"\"\"A claim whose lease ends exactly now still counts as live.\"\"\"
        async with open_store(url, clock=VirtualClock()) as store:
            ...
            assert await store.try_claim_step(run_id, "a"), "a claim whose lease has ended blocks"

Every module of this package whose name begins with ``postgres_`` or ``sqlite_`` is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The root of the repository."""

BACKENDS = ("postgresql", "sqlite")

KINDS = (
    "batching",
    "cache",
    "cancellation",
    "concurrency",
    "connection",
    "encoding",
    "index",
    "migration",
    "size",
    "sql",
    "time",
    "transaction",
)

Proof = Callable[[str], Awaitable[None]]
"""Gets the URL of a fresh, empty namespace. Raises AssertionError on the mutant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A replacement in a file; ``old`` occurs exactly once in it."""

    file: str
    """Relative to the root of the repository."""
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMutant:
    """A backend with one fault in its source."""

    name: str
    backend: str
    kind: str
    clauses: tuple[str, ...]
    """The clauses whose failing check names the fault."""
    description: str
    changes: tuple[Change, ...]
    proof: Proof
    hangs: bool
    """Whether the proof may run into its time limit on the mutant."""


_mutants: dict[tuple[str, str], SourceMutant] = {}


def source_mutant(
    backend: str,
    *,
    kind: str,
    clauses: Sequence[str],
    changes: Sequence[tuple[str, str, str]],
    hangs: bool = False,
) -> Callable[[Proof], Proof]:
    """Register a mutant. The decorated function is its proof; name and docstring say what the mutant does."""
    if backend not in BACKENDS or kind not in KINDS:
        raise ValueError(f"backend must be one of {BACKENDS} and kind one of {KINDS}: {backend!r}, {kind!r}")

    def register(proof: Proof) -> Proof:
        name = proof.__name__
        if (backend, name) in _mutants:
            raise ValueError(f"two mutants of {backend} are named {name}")
        _mutants[backend, name] = SourceMutant(
            name=name,
            backend=backend,
            kind=kind,
            clauses=tuple(clauses),
            description=" ".join((proof.__doc__ or "").split()),
            changes=tuple(Change(file=file, old=old, new=new) for file, old, new in changes),
            proof=proof,
            hangs=hangs,
        )
        return proof

    return register


def all_source_mutants() -> Sequence[SourceMutant]:
    """Every mutant, ordered by backend and name."""
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("postgres_*.py"), *folder.glob("sqlite_*.py")]):
        import_module(f"tests.source_mutants.{path.stem}")
    return [_mutants[key] for key in sorted(_mutants)]


def find_source_mutant(backend: str, name: str) -> SourceMutant:
    """Raise KeyError if there is none."""
    all_source_mutants()
    return _mutants[backend, name]


def changed_files(mutant: SourceMutant) -> dict[str, str]:
    """The new text of each file that a mutant changes. Raises ValueError if a change does not apply once."""
    texts: dict[str, str] = {}
    for change in mutant.changes:
        text = texts.get(change.file)
        if text is None:
            text = (ROOT / change.file).read_text(encoding="utf-8")
        if (found := text.count(change.old)) != 1:
            raise ValueError(
                f"{mutant.backend} {mutant.name}: the text to replace occurs {found} times in {change.file}, "
                f"not once: {change.old!r}"
            )
        texts[change.file] = text.replace(change.old, change.new)
    return texts


def copy_with_changes(mutant: SourceMutant, folder: Path) -> None:
    """Copy the packages that a mutant changes into a folder, with the changes."""
    texts = changed_files(mutant)
    for package in {file.partition("/")[0] for file in texts}:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
