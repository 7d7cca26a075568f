"""Races of every pair of writing operations, so that none is forgotten.

The pairs come from the operation table. A race of a pair has one client for each of its two operations. The
setup and the arguments are drawn several times, and the model selects a draw in which the two calls interact:
the order of the calls matters, or both change the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import combinations_with_replacement
from uuid import UUID

from flowstore_conformance.claim_histories import by_run
from flowstore_conformance.claim_tokens import ClaimToken
from flowstore_conformance.differential import guess_clause
from flowstore_conformance.history import Call, History, Raised, Returned
from flowstore_conformance.linearizability import Answer, Verdict, check_history
from flowstore_conformance.model import Model, State
from flowstore_conformance.operations import available_strategies, draw_call
from flowstore_conformance.phrasing import call_words
from flowstore_conformance.race_families.family import FLOW, RUN, RaceBuilder, RaceFamily, family
from flowstore_conformance.races import Race
from flowstore_conformance.state_probe import ModelState, probe_calls, rotate_probes
from flowstore_conformance.strategies import RandomChoices, Universe
from flowstore_conformance.write_scenarios import available
from flowstore_core import Capability, RunStatus
from flowstore_core.operations import OPERATIONS

Pair = tuple[str, str]
"""Two writing operations in the order of the operation table; an operation also races itself."""

CLEANUP = "cleanup"
STARTS = {"start_run", "trigger_run", "import_run"}
STEP_KEYS = ("a", "b")
OWNERS = ("o", "p", "q")
CLOCK_ADVANCE = timedelta(minutes=1)
"""How far the clock advances between setup and race, so that some leases and waits have ended."""
DRAWS = 6
"""Number of draws from which the one with the most interaction is selected."""
REPEATED_READS = 4
MAX_DRAWS = 50
"""Number of draws if the calls of none of them interact."""
EXPLAIN_BUDGET = 20_000

_ORDER = {name: number for number, name in enumerate(OPERATIONS)}


def writing_operations(capabilities: Collection[Capability]) -> list[str]:
    """The writing operations that a store with these capabilities offers, in the order of the table."""
    return [name for name, one in OPERATIONS.items() if one.writes and one.is_offered(capabilities)]


def pair_of(first: str, second: str) -> Pair:
    """The pair of two operations."""
    return (first, second) if _ORDER[first] <= _ORDER[second] else (second, first)


def run_pairs(capabilities: Collection[Capability]) -> list[Pair]:
    """Every pair of writing operations that name one run; claim_next_steps claims in queues of one race."""
    names = [name for name in writing_operations(capabilities) if name != CLEANUP]
    return list(combinations_with_replacement(names, 2))


def cleanup_pairs(capabilities: Collection[Capability]) -> list[Pair]:
    """Every pair of a writing operation and cleanup."""
    return [pair_of(name, CLEANUP) for name in writing_operations(capabilities)]


@dataclass(frozen=True, slots=True)
class _Draw:
    """A setup and the two calls of a pair."""

    setup: tuple[Call, ...]
    calls: tuple[Call, Call]
    before: ModelState
    """The state after the setup."""
    interaction: int
    """How much the two calls interact, from 0 to MAX_INTERACTION."""


MAX_INTERACTION = 3


def _interaction(before: ModelState, first: Call, second: Call) -> int:
    """Two points if the order of the calls matters, one if each of them changes the state."""
    one, other = _after(before, first), _after(before, second)
    both, reverse = _after(one, second), _after(other, first)
    in_order = (one.outcome, both.outcome, both.state)
    in_reverse_order = (reverse.outcome, other.outcome, reverse.state)
    return 2 * (in_order != in_reverse_order) + (before.state not in (one.state, other.state))


def _after(state: ModelState, call: Call) -> ModelState:
    return state.apply(call, exact_times=True)


def draw_pair(d: RaceBuilder, pair: Pair) -> Race:
    """Draw a race in which the two operations of a pair run concurrently on one run."""
    best, draws = _draw(d, pair), 1
    while draws < (DRAWS if best.interaction else MAX_DRAWS) and best.interaction < MAX_INTERACTION:
        best, draws = max(best, _draw(d, pair), key=lambda one: one.interaction), draws + 1
    clients: list[tuple[Call, ...]] = [(call,) for call in best.calls]
    shape = d.one_of("pair", "pair", "followed", "read", "crowd")
    if shape == "followed":
        number = d.one_of(0, 1)
        first = best.calls[number]
        clients[number] = (first, _following(d, pair, _after(best.before, first)))
    elif shape == "read":
        reads = probe_calls(RUN, d.capabilities, step_keys=STEP_KEYS)
        clients.append((d.one_of(*reads), d.one_of(*reads)))
    elif shape == "crowd":
        names = [name for name in writing_operations(d.capabilities) if not OPERATIONS[name].spans_runs]
        universe = _universe(d, pair, best.before)
        clients += [(_call(d, universe, d.one_of(*names)),) for _ in range(d.one_of(1, 2, 3))]
    if CLEANUP in pair:
        clients = _delete_once([tuple(map(_keep_running, client)) for client in clients], best.calls)
    return Race(
        setup=best.setup,
        clients=tuple(clients),
        final=_final(d, [*best.setup, *(call for client in clients for call in client)], best.calls),
        clock_advance=CLOCK_ADVANCE,
    )


def _keep_running(call: Call) -> Call:
    """Import a run as Running: a cleanup could delete an ended one again, in its next batch (RET-3)."""
    if call.method != "import_run":
        return call
    archive = call.arguments["archive"]
    run = replace(archive.run, status=RunStatus.RUNNING, completed_at=None)
    return replace(call, arguments={"archive": replace(archive, run=run)})


def _delete_once(clients: Sequence[tuple[Call, ...]], pair: Sequence[Call]) -> list[tuple[Call, ...]]:
    """Drop calls, but none of the pair, until no run can start and end beside a cleanup.

    The next batch of the cleanup could delete such a run, and count a second run of its id (RET-3).
    """
    calls = [call for client in clients for call in client]
    if not (any(map(_starts_run, calls)) and any(map(_ends_run, calls))):
        return list(clients)
    is_dropped = _ends_run if any(map(_starts_run, pair)) else _starts_run
    kept = [tuple(call for call in client if not is_dropped(call)) for client in clients]
    return [client for client in kept if client]


def _starts_run(call: Call) -> bool:
    return call.method in STARTS


def _ends_run(call: Call) -> bool:
    """Whether a call may end a run: an advance may, if it names a status for the run."""
    ends = [call.arguments.get("complete_as")]
    ends += [step.complete_as for step in call.arguments.get("steps", ())]
    return call.method == "complete_run" or any(end is not None for end in ends)


def draw_disturbed(d: RaceBuilder, method: str) -> Race:
    """Draw a race for disturbed stores: a call of ``method`` beside two other writes, and repeated reads.

    The calls of its last phase are made on an undisturbed store.
    """
    names = [name for name in writing_operations(d.capabilities) if name != CLEANUP]
    pair = pair_of(method, d.one_of(*names))
    best = max((_draw(d, pair) for _ in range(DRAWS)), key=lambda one: one.interaction)
    universe = _universe(d, pair, best.before)
    writes = [*best.calls, _call(d, universe, d.one_of(*names))]
    reads = probe_calls(RUN, d.capabilities, step_keys=STEP_KEYS)
    clients = tuple((write, d.one_of(*reads)) for write in writes)
    # A store that answers from a cache shows only in the same read again.
    clients += tuple((d.one_of(*reads),) * REPEATED_READS for _ in range(2))
    return Race(
        setup=best.setup,
        clients=clients,
        final=_final(d, [*best.setup, *writes], best.calls),
        clock_advance=CLOCK_ADVANCE,
    )


def _draw(d: RaceBuilder, pair: Pair) -> _Draw:
    before = ModelState(lambda: d.now, State())
    setup = []
    for call in _setup(d, pair):
        following = _after(before, call)
        # A call without an effect tells nothing about the race.
        if not isinstance(following.outcome, Raised) and following.state != before.state:
            setup.append(call)
            before = following
    universe = _universe(d, pair, before)
    for _ in range(d.one_of(0, 0, 1, 2)):
        # More calls of the two operations themselves: earlier attempts, earlier claims, earlier deliveries.
        call = _call(d, universe, d.one_of(*pair))
        if call.method == CLEANUP:
            continue
        following = _after(before, call)
        if isinstance(following.outcome, Raised):
            continue
        before = following
        setup.append(call)
        universe = _universe(d, pair, before)
    before.clock = lambda: d.now + CLOCK_ADVANCE
    universe = _universe(d, pair, before)
    first, second = (_call(d, universe, name) for name in pair)
    return _Draw(tuple(setup), (first, second), before, _interaction(before, first, second))


def _setup(d: RaceBuilder, pair: Pair) -> list[Call]:
    """Calls after which the operations of a pair have an effect: the setups of their write scenarios."""
    setups = _setups(frozenset(d.capabilities))
    names = d.one_of(pair, pair[::-1], pair[:1], pair[1:])
    chosen = [call for name in names if name in setups for call in d.one_of(*setups[name])]
    if not chosen and d.one_of(True, True, False):
        chosen = [d.start_run()]
    if d.one_of(False, False, False, True):
        # A run may be configured before it starts (CTL-1), and then any call finds a control record alone.
        chosen = [d.on("configure_run", flow_id=FLOW, trigger_key="t", timeout_at=d.now)]
    if {CLEANUP, "delete_run"} & set(pair) and d.one_of(True, True, True, False):
        chosen.append(d.on("complete_run", status="Failed"))
    return chosen


@cache
def _setups(capabilities: frozenset[Capability]) -> Mapping[str, Sequence[Sequence[Call]]]:
    """The setups of the write scenarios of each operation."""
    found: dict[str, list[Sequence[Call]]] = {}
    for factory in available(capabilities).values():
        setup, write = factory(RUN, FLOW)
        found.setdefault(write.method, []).append(setup)
    return found


def _universe(d: RaceBuilder, pair: Pair, state: ModelState) -> Universe:
    """The names that calls use: one run, and for idempotency keys another one, whose ids differ.

    Beside a cleanup only one run, because a cleanup is atomic for each run, not for several (RET-3).
    """
    runs = [RUN] if CLEANUP in pair or d.one_of(True, True, False) else [RUN, UUID(int=2)]
    keys = STEP_KEYS[:1] if d.one_of(True, True, False) else STEP_KEYS
    return Universe(
        model=Model(state.clock, state.state),
        runs=runs,
        flows=[FLOW],
        keys=keys,
        owners=OWNERS,
        capabilities=d.capabilities,
    )


def _call(d: RaceBuilder, universe: Universe, method: str) -> Call:
    if method == CLEANUP:
        return Call(method=method, arguments={"cutoff": d.now + timedelta(hours=12)})
    call = draw_call(RandomChoices(d.generator), universe, method)
    if isinstance(call.arguments.get("owner"), ClaimToken):
        # No call of a race can know the owner that a store will choose.
        return replace(call, arguments={**call.arguments, "owner": d.one_of(*OWNERS)})
    if method == "advance_runs":
        # Only one, because a call is not atomic as a whole.
        steps = [replace(step, owner=d.one_of(None, *OWNERS)) for step in call.arguments["steps"][:1]]
        return replace(call, arguments={"steps": steps})
    if method == "renew_step_claims":
        # Only one, because each claim is decided alone (CLM-6).
        claims = [
            (run_id, step_key, d.one_of(*OWNERS) if isinstance(owner, ClaimToken) else owner)
            for run_id, step_key, owner in call.arguments["claims"][:1]
        ]
        return replace(call, arguments={**call.arguments, "claims": claims})
    return call


def _following(d: RaceBuilder, pair: Pair, state: ModelState) -> Call:
    """A second call of a client, drawn from the state after its first; it ends many of the Running runs."""
    run = state.state.runs.get(RUN)
    running = run is not None and run.record is not None and not run.record.status.is_terminal
    if running and d.one_of(True, False):
        return d.on("complete_run", status="Cancelled")
    weights = {
        name: one.weight
        for name, one in available_strategies(d.capabilities).items()
        if not OPERATIONS[name].spans_runs
    }
    [method] = d.generator.choices(list(weights), list(weights.values()))
    return _call(d, _universe(d, pair, state), method)


def _final(d: RaceBuilder, calls: Sequence[Call], repeated: Sequence[Call]) -> tuple[Call, ...]:
    """Reads of all state; then both calls again, whose results show state that no read shows."""
    ids = [call.arguments["run_id"] for call in calls if "run_id" in call.arguments]
    ids += [step.run_id for call in calls for step in call.arguments.get("steps", ())]
    archives = [call.arguments["archive"] for call in calls if call.method == "import_run"]
    runs = list(dict.fromkeys((RUN, *ids, *(archive.run_id for archive in archives))))
    scopes = dict.fromkeys(
        (given["flow_id"], given["trigger_key"], given["idempotency_key"])
        for given in (call.arguments for call in calls if call.method != "configure_run")
        if given.get("idempotency_key") is not None
    )
    keys = (key for archive in archives for key in archive.idempotency_keys)
    scopes |= dict.fromkeys((key.flow_id, key.trigger_key, key.idempotency_key) for key in keys)
    reads = [read for run_id in runs for read in probe_calls(run_id, d.capabilities, step_keys=STEP_KEYS)]
    if not d.reads_all:
        reads = rotate_probes(reads, d.generator.getrandbits(8))
    reads += probe_calls(RUN, d.capabilities, keys=list(scopes))[-len(scopes) :] if scopes else []
    if CLEANUP not in {call.method for call in repeated}:
        return (*reads, *repeated, *d.final_reads())
    # A cleanup of the next race would also count the runs that are left, so they end and go.
    ends = [Call(method="complete_run", arguments={"run_id": one, "status": "Failed"}) for one in runs]
    return (*reads, *ends, next(call for call in repeated if call.method == CLEANUP), *reads)


# Explanations


def missing_effect(history: History) -> str | None:
    """Explain a race in which the effect of one call was lost: without that call, an order exists."""
    for one in history.operations:
        wrote = one.client >= 0 and one.call.operation.writes and isinstance(one.outcome, Returned)
        if not wrote or one.outcome == Returned(False):
            continue
        others = History(tuple(other for other in history.operations if other is not one))
        if check_history(by_run(others), budget=EXPLAIN_BUDGET).answer is Answer.LINEARIZABLE:
            rivals = dict.fromkeys(
                other.call.method
                for other in history.operations
                if other is not one and other.client >= 0 and other.call.operation.writes
            )
            return (
                f"the effect of {call_words(one.call)} by client {one.client} is lost, although the call "
                f"returned: all other results are right if it never happened; it ran beside "
                f"{', '.join(rivals) or 'reads'}. Each call must read and write the run atomically"
            )
    return None


def _clause_of_write(reads: str, verdict: Verdict) -> str | None:
    """The clause of the first write with a wrong outcome; ``reads`` if only reads have wrong outcomes."""
    for one, right in zip(verdict.unplaced, verdict.expected, strict=False):
        if one.call.operation.writes:
            return guess_clause(one.call, right, one.outcome)
    return reads


def _any_run_pair(d: RaceBuilder) -> Race:
    return draw_pair(d, d.one_of(*run_pairs(d.capabilities)))


def _any_cleanup_pair(d: RaceBuilder) -> Race:
    return draw_pair(d, d.one_of(*cleanup_pairs(d.capabilities)))


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family(
        "pairs",
        "CON-1 CON-2",
        "two writing operations on one run",
        _any_run_pair,
        Capability.VIRTUAL_CLOCK,
        explain=missing_effect,
        clause_of=lambda verdict: _clause_of_write("CON-1", verdict),
    ),
    family(
        "cleanup_pairs",
        "RET-3 RET-2 CON-1",
        "a writing operation and a cleanup",
        _any_cleanup_pair,
        Capability.VIRTUAL_CLOCK,
        exclusive=True,
        explain=missing_effect,
        clause_of=lambda verdict: _clause_of_write("RET-3", verdict),
    ),
)
