"""Renders docs/source-mutants.md from the results of the suite on the source mutants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.source_mutants import BACKENDS, KINDS, ROOT, SourceMutant

MATRIX = ROOT / "docs" / "source-mutants.md"

PROFILES = ("quick", "standard")

HEAD = """\
# Source mutants

How well the conformance suite finds faults that its authors did not think of. A source mutant is a copy of a
SQL backend with one fault in its source: in SQL text, a transaction, a batch, an index, a migration. Its
author read the contract and the code of the backend, and not the checks of the suite. Each mutant has a
proof, a program that passes on the correct backend and fails on the mutant. The proof may prepare a situation
with SQL of its own; the wrong result shows through the public API.

A mutant is *killed* if a check fails and names a clause that the fault breaks, and found by *another clause*
if checks fail and name only others.

Each mutant ran with the checks that cite one of its clauses. `standard` ran on the mutants that `quick` did
not kill, and counts the others as killed: it runs the same checks with more work, and all of those of which
`quick` selects one.

Generated from the results of the commands below; do not edit.

```bash
python -m tests.source_mutants --prove
python -m tests.source_mutants --own --profile quick --results results.json
python -m tests.source_mutants --own --profile standard --survivors --results results.json --publish
```
"""

Outcomes = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""By backend, name and profile."""


def render(mutants: Sequence[SourceMutant], results: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    outcomes = {(one["backend"], one["name"], one["profile"]): one for one in results}
    for backend, name, profile in list(outcomes):
        if profile == "quick" and outcomes[backend, name, profile]["verdict"] == "killed":
            outcomes[backend, name, "standard"] = {"verdict": "killed"}
    lines = [HEAD, f"{len(mutants)} mutants.", "", "## Rates", ""]
    lines += _rates("backend", BACKENDS, lambda one: one.backend, mutants, outcomes)
    lines += ["", *_rates("kind", KINDS, lambda one: one.kind, mutants, outcomes)]
    lines += ["", "## Mutants", ""]
    columns = ["mutant", "backend", "kind", "fault", "clauses", *PROFILES]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for mutant in mutants:
        cells = [
            mutant.name,
            mutant.backend,
            mutant.kind,
            mutant.description.replace("|", "\\|"),
            " ".join(mutant.clauses),
            *(_verdict(outcomes.get((mutant.backend, mutant.name, profile))) for profile in PROFILES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "not run"
    if outcome == {"verdict": "killed"}:
        return "as quick"
    if outcome["verdict"] == "killed":
        return f"`{outcome['check']}` ({outcome['clause']}, {outcome['seconds']:g} s)"
    if outcome["verdict"] == "other clause":
        return f"another clause: `{outcome['check']}` ({outcome['clause']})"
    return f"**{outcome['verdict']}**"


def _rates(
    title: str,
    groups: Sequence[str],
    group_of: Any,
    mutants: Sequence[SourceMutant],
    outcomes: Outcomes,
) -> list[str]:
    """A table with a row for each group: its number of mutants, and the rate of each profile."""
    lines = [f"| {title} | mutants | {' | '.join(PROFILES)} |", "|---" * (2 + len(PROFILES)) + "|"]
    for group in (*groups, "all"):
        members = [one for one in mutants if group in ("all", group_of(one))]
        if members:
            rates = [_rate(members, outcomes, profile) for profile in PROFILES]
            lines.append(f"| {group} | {len(members)} | {' | '.join(rates)} |")
    return lines


def _rate(mutants: Sequence[SourceMutant], outcomes: Outcomes, profile: str) -> str:
    verdicts = [
        outcomes[key]["verdict"] for one in mutants if (key := (one.backend, one.name, profile)) in outcomes
    ]
    if not verdicts:
        return "not run"
    killed, other = verdicts.count("killed"), verdicts.count("other clause")
    more = f", {other} by another clause" if other else ""
    return f"{killed} of {len(verdicts)} killed ({killed / len(verdicts):.0%}){more}"
