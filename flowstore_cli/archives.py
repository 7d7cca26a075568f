"""``flowstore runs export`` and ``import``: runs as lines of JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from flowstore_cli.failures import NO, USAGE, Failure
from flowstore_cli.printing import print_json, say
from flowstore_cli.references import RunId, Runs, find_run
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_cli.words import in_words
from flowstore_core import ConflictError, InvalidArgumentError, RunArchive, RunNotFoundError
from flowstore_core.inspection.wording import count

STDIN = "-"
Files = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FILE]...", help="Files with one archive per line. Default: standard input."),
]


def export_runs(references: Runs, url: Url = None) -> None:
    """Write runs to standard output, one line of JSON each.

    A line holds everything that belongs to one run, from one snapshot. The claims of its workers end in
    it. docs/transfer.md describes the JSON.

    \b
      flowstore runs export RUN > run.jsonl
      flowstore runs export RUN RUN | flowstore runs import --url sqlite:///other.db
    """
    run(_export(url, references))


async def _export(url: str | None, references: Sequence[RunId]) -> None:
    async with existing_store(url) as store:
        for reference in references:
            run_id = await find_run(store, reference)
            archive = await store.export_run(run_id)
            if archive is None:
                raise RunNotFoundError(run_id)
            sys.stdout.write(f"{archive.to_json()}\n")


def import_runs(files: Files = None, url: Url = None, as_json: AsJson = False) -> None:
    """Store runs that flowstore runs export wrote.

    Each run is stored whole or not at all. A run that is stored already, unchanged, is skipped. The first
    run that cannot be imported ends the command; those before it are stored.

    \b
      flowstore runs import run.jsonl
      flowstore runs export RUN | flowstore runs import --url sqlite:///other.db

    JSON: imported, present (the numbers of runs).
    """
    imported, present = run(_import(url, files or [Path(STDIN)]))
    if as_json:
        print_json({"imported": imported, "present": present})
    else:
        say(f"imported {count(imported, 'run')}" + (f"; {present:,} already there" if present else ""))


async def _import(url: str | None, files: Sequence[Path]) -> tuple[int, int]:
    outcomes = []
    async with existing_store(url) as store:
        for where, line in _lines(files):
            try:
                archive = RunArchive.from_json(line.decode())
                outcomes.append(await store.import_run(archive))
            except UnicodeDecodeError as error:
                raise Failure(f"{where} must be UTF-8, and its byte {error.start:,} is not", USAGE) from None
            except (ConflictError, InvalidArgumentError) as error:
                code = USAGE if isinstance(error, InvalidArgumentError) else NO
                raise Failure(
                    f"{where}: {in_words(error)}; {len(outcomes):,} before it are stored", code
                ) from None
    return sum(outcomes), len(outcomes) - sum(outcomes)


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Each line that is not blank, with its place."""
    with ExitStack() as stack:
        for path in files:
            name, lines = f"{path}", _open(path, stack)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{'standard input' if name == STDIN else name}, line {number:,}", line


def _open(path: Path, stack: ExitStack) -> BinaryIO:
    if str(path) == STDIN:
        return sys.stdin.buffer
    try:
        return stack.enter_context(path.open("rb"))
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}", USAGE) from error
