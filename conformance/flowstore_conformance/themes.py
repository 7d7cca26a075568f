"""What races are about: for each theme, how a race is drawn and what may be said of it in plain words.

Every race of a theme contends for one run, or one idempotency key, and mostly for one step of it. Programs
are drawn whole before they run, so no call depends on an answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.agreement import expected_outcome, is_read
from flowstore_conformance.calls import SPANNING, RandomChooser, World, draw_call, drawable_methods
from flowstore_conformance.history import Call, History, Returned
from flowstore_conformance.model import Model
from flowstore_conformance.racing import BEFORE, Race
from flowstore_core import Capability

Maker = Callable[[int], Call]
"""A call by a client's number."""

LEASE = timedelta(seconds=30)
FLOW = UUID(int=100)
RUN = UUID(int=1)


@dataclass(slots=True)
class Drawing:
    """What a theme draws with."""

    generator: random.Random
    capabilities: Collection[Capability]
    now: datetime
    run: UUID = RUN
    count: int = 0
    """How many clients."""

    def __post_init__(self) -> None:
        self.count = self.generator.choice((2, 3, 3, 4, 4, 4, 6, 8))

    def one_of(self, *options: Any) -> Any:
        return self.generator.choice(options)

    def on(self, method: str, **arguments: Any) -> Call:
        return Call(method=method, arguments={"run_id": self.run, **arguments})

    def step(self, method: str, **arguments: Any) -> Call:
        return self.on(method, **{"step_key": "a", **arguments})

    def start_run(self, run_id: UUID | None = None) -> Call:
        given = {"flow_id": FLOW, "flow_name": "races", "run_id": run_id or self.run, "trigger_key": "t"}
        return Call(method="start_run", arguments=given)

    def has(self, capability: Capability) -> bool:
        return capability in self.capabilities

    def clients(self, *makers: Maker, first: Maker | None = None) -> tuple[tuple[Call, ...], ...]:
        """Programs of calls that are drawn from the makers; ``first`` opens each of them."""
        longest = 3 if self.count <= 3 else 2 if self.count <= 4 else 1
        programs = []
        for client in range(self.count):
            length = self.generator.randint(1, longest)
            calls = [self.generator.choice(makers)(client) for _ in range(length)]
            programs.append(tuple([first(client), *calls[1:]] if first is not None else calls))
        return tuple(programs)

    def look(self, *more: Call) -> tuple[Call, ...]:
        """What is looked at in the end."""
        return (self.on("get_run_detail"), self.on("get_step_claims"), self.on("get_dispatches"), *more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """One kind of race."""

    name: str
    clauses: tuple[str, ...]
    sentence: str
    draw: Callable[[Drawing], Race]
    needs: frozenset[Capability] = frozenset()
    alone: bool = False
    """Only one race at a time, because a call looks at all runs."""
    tell: Callable[[History], str | None] = field(default=lambda history: None)
    """What is wrong, in plain words, where counting shows it."""


# Claims and dispatches


def _owner(client: int) -> str:
    return f"owner {client}"


def _claim(d: Drawing, **more: Any) -> Maker:
    return lambda client: d.step("try_claim_step", owner=_owner(client), **more)


def _claims(d: Drawing) -> Race:
    nobody = d.one_of(False, False, False, True)
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            _claim(d),
            lambda client: d.on("get_step_claims"),
            lambda client: d.on("get_claimed_step_keys"),
            lambda client: d.step("release_step_claim", owner=_owner(client)),
            first=(lambda client: d.step("try_claim_step")) if nobody else _claim(d),
        ),
        final=d.look(d.on("get_claimed_step_keys")),
    )


def _claims_of_one_owner(d: Drawing) -> Race:
    def owner(client: int) -> str:
        return _owner(client % 2)

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            lambda client: d.step("try_claim_step", owner=owner(client)),
            lambda client: d.step("release_step_claim", owner=owner(client)),
            lambda client: d.step("record_step_start", step_type="s", owner=owner(client)),
            first=lambda client: d.step("try_claim_step", owner=owner(client)),
        ),
        final=d.look(),
    )


def _takeovers(d: Drawing) -> Race:
    setup = [d.start_run(), d.step("try_claim_step", owner="old", lease=LEASE)]
    if d.one_of(True, False):
        setup.append(d.step("record_step_start", step_type="s", owner="old"))
    return Race(
        setup=tuple(setup),
        clients=d.clients(
            _claim(d, lease=LEASE),
            _claim(d, lease=LEASE),
            lambda client: d.step("renew_step_claim", owner="old", lease=LEASE),
            lambda client: d.step("try_claim_step", owner="old", lease=LEASE),
            lambda client: d.step("record_step_start", step_type="s", owner=d.one_of("old", _owner(client))),
            lambda client: d.step("record_step_complete", status="Succeeded", attempt=1),
            lambda client: d.step("release_step_claim", owner="old"),
        ),
        final=d.look(),
        jump=LEASE,
    )


def _dispatches(d: Drawing) -> Race:
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.step("annotate_dispatch", job_id=f"job {client}"),
            lambda client: d.on("get_dispatched_step_keys"),
            lambda client: d.step("release_dispatch") if d.one_of(True, False) else d.on("get_dispatches"),
            first=lambda client: d.step("try_record_dispatch"),
        ),
        final=d.look(d.on("get_dispatched_step_keys")),
    )


def winners(method: str, undone_by: Sequence[str]) -> Callable[[History], str | None]:
    """Names everybody who won a race that nobody gave up, retried or reset meanwhile."""

    def tell(history: History) -> str | None:
        racing = [one for one in history.operations if one.client >= 0]
        if any(one.call.method in undone_by for one in racing):
            return None
        won = [one for one in racing if one.call.method == method and one.outcome == Returned(True)]
        who = list(
            dict.fromkeys(str(one.call.arguments.get("owner") or f"client {one.client}") for one in won)
        )
        if len(won) < 2 or (len(who) < 2 and won[0].call.arguments.get("owner")):
            return None
        return (
            f"{len(won)} of {len(racing)} calls won what only one can win: {method} was True for {_list(who)}"
        )

    return tell


def numbers_given_twice(history: History) -> str | None:
    """Attempts that two calls were told to be theirs."""
    given: dict[Any, list[str]] = {}
    for one in history.operations:
        if one.call.method == "record_step_start" and isinstance(one.outcome, Returned):
            if one.call.arguments.get("owner") is not None:
                continue  # Said again under one claim, the number comes back.
            client = "the setup" if one.client == BEFORE else f"client {one.client}"
            given.setdefault((one.call.arguments["step_key"], one.outcome.value), []).append(client)
    for (key, number), clients in given.items():
        if len(clients) > 1:
            return f"attempt {number} of step {key!r} was given to {_list(clients)}"
    return None


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


# Steps


def _start(d: Drawing) -> Maker:
    return lambda client: d.step("record_step_start", step_type="s", job_id=f"job {client}")


def _complete(d: Drawing, attempt: int | None = None) -> Maker:
    def make(client: int) -> Call:
        status = d.one_of("Succeeded", "Failed", "Pending")
        said = {"status": status, "output_json": str(client), "attempt": attempt or d.one_of(1, 2, None)}
        return d.step("record_step_complete", **said)

    return make


def _attempts(d: Drawing) -> Race:
    before = (d.step("record_step_start", step_type="s"),) * d.one_of(0, 1)
    return Race(
        setup=(d.start_run(), *before),
        clients=d.clients(
            _start(d),
            _start(d),
            _start(d),
            lambda client: d.step("record_step_complete", status="Failed", output_json=str(client)),
            lambda client: d.on("get_run_detail"),
        ),
        final=d.look(d.on("get_step_statuses")),
    )


def _starts_under_claims(d: Drawing) -> Race:
    return Race(
        setup=(d.start_run(), d.step("try_claim_step", owner=_owner(0))),
        clients=d.clients(
            lambda client: d.step("record_step_start", step_type="s", owner=_owner(d.one_of(0, client))),
            lambda client: d.step("record_step_start", step_type="s", owner=_owner(0)),
            lambda client: d.step("release_step_claim", owner=_owner(0)),
            _claim(d),
            lambda client: d.on("get_run_detail"),
        ),
        final=d.look(),
    )


def _completions(d: Drawing) -> Race:
    return Race(
        setup=(d.start_run(), d.step("record_step_start", step_type="s")),
        clients=d.clients(
            _complete(d, 1), _complete(d, 1), _complete(d), _start(d), lambda client: d.on("get_run_detail")
        ),
        final=d.look(),
    )


def _skips(d: Drawing) -> Race:
    def skip(client: int) -> Call:
        reason = {"step_type": "s", "reason": str(client)}
        return d.step("record_skipped_step", **reason, owner=d.one_of(None, _owner(client), _owner(0)))

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(skip, skip, skip, _claim(d), _start(d), lambda client: d.on("get_run_detail")),
        final=d.look(),
    )


def _ended_run(d: Drawing) -> list[Call]:
    """A run that is Failed, with a step that failed and one that was skipped for it."""
    return [
        d.start_run(),
        d.step("try_claim_step", owner="first"),
        d.step("try_record_dispatch"),
        d.step("record_step_start", step_type="s", owner="first"),
        d.step("record_step_complete", status="Failed", error_message="no", attempt=1),
        d.step("record_skipped_step", step_key="b", step_type="s", reason="a failed"),
        d.on("complete_run", status="Failed"),
    ]


def _retries(d: Drawing) -> Race:
    def retry(client: int) -> Call:
        return d.step("retry_step", attempt=d.one_of(1, 1, None), reset=d.one_of(["b"], ["b"], []))

    setup = _ended_run(d)
    return Race(
        setup=tuple(setup if d.one_of(True, True, False) else setup[:-1]),
        clients=d.clients(
            retry,
            retry,
            retry,
            _start(d),
            _claim(d),
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.on("complete_run", status="Cancelled"),
            _complete(d, 1),
            lambda client: d.on("get_run_detail"),
            lambda client: d.step("record_step_start", step_key="b", step_type="s"),
        ),
        final=d.look(),
    )


def _reschedules(d: Drawing) -> Race:
    def reschedule(client: int) -> Call:
        return d.step("reschedule_step", attempt=1, output_json=str(client))

    return Race(
        setup=(
            d.start_run(),
            d.step("try_record_dispatch"),
            d.step("try_claim_step", owner="first"),
            d.step("record_step_start", step_type="s", owner="first"),
        ),
        clients=d.clients(
            reschedule,
            reschedule,
            reschedule,
            _complete(d, 1),
            _claim(d),
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.step("annotate_dispatch", job_id=f"job {client}"),
            _start(d),
            lambda client: d.on("complete_run", status="Failed"),
            lambda client: d.on("get_dispatches"),
        ),
        final=d.look(),
    )


# Runs, controls and keys


def _ends(d: Drawing) -> Race:
    def end(client: int) -> Call:
        return d.on("complete_run", status=d.one_of("Succeeded", "Failed", "Cancelled"))

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(end, end, end, _start(d), _claim(d), lambda client: d.on("get_run_detail")),
        final=d.look(),
    )


def _expected_ends(d: Drawing) -> Race:
    def end(client: int) -> Call:
        return d.on("complete_run", status="Succeeded", expected={"a": "Succeeded"})

    def other(method: str, **arguments: Any) -> Maker:
        return lambda client: d.step(method, **{"step_key": d.one_of("a", "b"), **arguments})

    return Race(
        setup=(
            d.start_run(),
            d.step("record_step_start", step_type="s"),
            d.step("record_step_complete", status="Succeeded", attempt=1),
        ),
        clients=d.clients(
            end,
            end,
            other("record_step_start", step_type="s"),
            other("try_claim_step", owner="somebody"),
            other("try_record_dispatch"),
            lambda client: d.step("retry_step", attempt=1),
            lambda client: d.on("get_run_detail"),
        ),
        final=d.look(),
    )


def _latches(d: Drawing) -> Race:
    def configure(client: int) -> Call:
        return d.on("configure_run", flow_id=FLOW, trigger_key="t", timeout_at=d.one_of(None, d.now + LEASE))

    makers: list[Maker] = [
        lambda client: d.on("request_cancel", reason=f"client {client}"),
        lambda client: d.on("request_cancel", reason=f"client {client}"),
        lambda client: d.on("mark_timed_out", reason=f"late {client}"),
        lambda client: d.on("mark_timed_out", reason=f"late {client}"),
        lambda client: d.on("get_run_control"),
        configure,
    ]
    if d.has(Capability.DEADLINES):
        makers.append(lambda client: d.on("extend_deadline", timeout_at=d.now + 2 * LEASE))
    return Race(
        setup=(d.start_run(), *((configure(0),) * d.one_of(0, 1))),
        clients=d.clients(*makers),
        final=d.look(d.on("get_run_control")),
    )


KEY = {"flow_id": FLOW, "trigger_key": "t", "idempotency_key": "k"}


def _register(client: int) -> Call:
    return Call(method="try_register_idempotency_key", arguments={**KEY, "run_id": UUID(int=1 + client)})


def _find(client: int = 0) -> Call:
    return Call(method="find_run_id_by_idempotency_key", arguments=KEY)


def _keys(d: Drawing) -> Race:
    return Race(
        setup=(),
        clients=d.clients(_register, _register, _find, first=_register),
        final=(_find(),),
    )


def _trigger(client: int) -> Call:
    given = {**KEY, "flow_name": "races", "run_id": UUID(int=1 + client), "job_id": f"job {client}"}
    return Call(method="trigger_run", arguments=given)


def _triggers(d: Drawing) -> Race:
    ids = [UUID(int=1 + client) for client in range(d.count)]
    makers: list[Maker] = [
        _trigger,
        _trigger,
        _trigger,
        _find,
        lambda client: Call(method="get_run_control", arguments={"run_id": d.one_of(*ids)}),
    ]
    if d.one_of(True, False):
        makers += [_register, lambda client: d.start_run(d.one_of(*ids))]
    looks = [Call(method=name, arguments={"run_id": one}) for one in ids for name in LOOKS_AT_TRIGGERED]
    return Race(setup=(), clients=d.clients(*makers), final=(_find(), *looks))


LOOKS_AT_TRIGGERED = ("get_run_detail", "get_run_control")


# Signals, events, outputs, retention


def _deliver(d: Drawing) -> Maker:
    return lambda client: d.on(
        "deliver_signal",
        signal_name="go",
        payload_json=str(client),
        delivery_id=d.one_of(None, None, f"delivery {client}", "one delivery"),
    )


def _deliveries(d: Drawing) -> Race:
    waiters = d.generator.sample(["a", "b", "c"], d.one_of(1, 2, 3))
    deliver = _deliver(d)
    others: list[Maker] = [
        lambda client: d.step("remove_waiter"),
        lambda client: d.step("register_waiter", step_key=d.one_of("a", "b"), signal_name="go"),
        lambda client: d.step("get_waiter"),
    ]
    mixed = others if d.one_of(True, False) else []
    return Race(
        setup=(
            d.start_run(),
            *(d.step("register_waiter", step_key=key, signal_name="go") for key in sorted(waiters)),
        ),
        clients=d.clients(deliver, deliver, deliver, *mixed),
        final=tuple(d.step("get_waiter", step_key=key) for key in ("a", "b", "c")),
    )


def _expiries(d: Drawing) -> Race:
    return Race(
        setup=(
            d.start_run(),
            d.step("register_waiter", signal_name="go", expires_at=d.now + LEASE),
            d.step("register_waiter", step_key="b", signal_name="go"),
        ),
        clients=d.clients(
            _deliver(d),
            _deliver(d),
            lambda client: d.step("expire_waiter"),
            lambda client: d.step("expire_waiter"),
            lambda client: d.step("remove_waiter"),
            lambda client: d.step("register_waiter", signal_name="go", expires_at=d.now + 3 * LEASE),
        ),
        final=(d.on("get_waiters"),),
        jump=LEASE,
    )


def _events(d: Drawing) -> Race:
    def read(client: int) -> Call:
        return d.on("get_run_events", after=d.one_of(0, 0, 1))

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(*[lambda client: d.on("append_event", event_type=f"by {client}")] * 3, read),
        final=(d.on("get_run_events"),),
    )


def _outputs(d: Drawing) -> Race:
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            lambda client: d.on("save_output", key=d.one_of("k", "k", "K"), value_json=str(client)),
            lambda client: d.on("save_output", key="k", value_json=str(client)),
            lambda client: d.on("get_output", key="k"),
            lambda client: d.on("get_outputs"),
        ),
        final=(d.on("get_outputs"),),
    )


def _cleanups(d: Drawing) -> Race:
    again = UUID(int=2)
    later = d.now + timedelta(hours=12)
    clean = Call(method="cleanup", arguments={"cutoff": later})
    first = _register(0) if not d.has(Capability.TRIGGER) else _trigger(0)
    begin = _ended_run(d)[1:] if first.method == "trigger_run" else [*_ended_run(d)]
    makers: list[Maker] = [
        lambda client: clean,
        lambda client: clean,
        lambda client: d.step("retry_step", attempt=1, reset=["b"]),
        lambda client: d.on("get_run_detail"),
        lambda client: d.start_run(),
        lambda client: d.step("register_waiter", signal_name="go"),
        lambda client: d.on("request_cancel"),
        _find,
    ]
    if d.has(Capability.TRIGGER):
        makers += [lambda client: _trigger(1)] * 2
    if d.has(Capability.EVENTS):
        makers.append(lambda client: d.on("append_event", event_type="e"))
    ends = [
        call
        for one in (d.run, again)
        for call in (
            Call(method="get_run_detail", arguments={"run_id": one}),
            Call(method="get_run_control", arguments={"run_id": one}),
        )
    ]
    # Whatever is left would be counted by the next race's cleanup.
    sweep = [
        Call(method="complete_run", arguments={"run_id": one, "status": "Failed"}) for one in (d.run, again)
    ]
    return Race(
        setup=(first, *begin),
        clients=d.clients(*makers),
        final=(_find(), *ends, *sweep, clean, ends[0]),
    )


def _anything(d: Drawing) -> Race:
    """Any operations that name a run, drawn from the state that the setup leaves."""
    chooser = RandomChooser(d.generator)
    model = Model(lambda: d.now)
    runs = [UUID(int=1), UUID(int=2)]
    keys = ["a"] if d.one_of(True, False) else ["a", "b"]
    world = World(model=model, runs=runs, flows=[FLOW], keys=keys, capabilities=d.capabilities)
    methods = {
        name: one.weight * d.one_of(0, 1, 1, 2)
        for name, one in drawable_methods(d.capabilities).items()
        if name not in SPANNING
    }

    def draw() -> Call:
        [method] = d.generator.choices(list(methods), list(methods.values()))
        return draw_call(chooser, world, method)

    setup = [d.start_run()]
    expected_outcome(model, setup[0])
    for _ in range(d.one_of(0, 2, 4, 8, 12)):
        call = draw()
        if not is_read(call):
            setup.append(call)
            expected_outcome(model, call)
    d.count = min(d.count, 4)
    clients = d.clients(lambda client: draw())
    looks = [
        Call(method=method, arguments={"run_id": run_id})
        for run_id in runs
        for method in ("get_run_detail", "get_run_control", "get_step_claims", "get_dispatches")
    ]
    waiters = [d.step("get_waiter", step_key=key) for key in keys]
    return Race(setup=tuple(setup), clients=clients, final=(*looks, *waiters))


ONE_WINNER = winners("try_claim_step", ("release_step_claim", "retry_step", "reschedule_step"))


def _theme(
    name: str,
    clauses: str,
    sentence: str,
    draw: Callable[[Drawing], Race],
    *needs: Capability,
    alone: bool = False,
    tell: Callable[[History], str | None] | None = None,
) -> Theme:
    given: dict[str, Any] = {} if tell is None else {"tell": tell}
    return Theme(
        name=name,
        clauses=tuple(clauses.split()),
        sentence=sentence,
        draw=draw,
        needs=frozenset(needs),
        alone=alone,
        **given,
    )


THEMES: tuple[Theme, ...] = (
    _theme("claims", "CLM-1 CLM-2 CLM-3", "claims of one step", _claims, tell=ONE_WINNER),
    _theme("claims_of_one_owner", "CLM-5", "claims by the same owners, said again", _claims_of_one_owner),
    _theme(
        "takeovers",
        "CLM-6",
        "claims of a step whose lease has just ended",
        _takeovers,
        Capability.LEASES,
        Capability.VIRTUAL_CLOCK,
        tell=ONE_WINNER,
    ),
    _theme(
        "dispatches",
        "CLM-1",
        "dispatches of one step",
        _dispatches,
        tell=winners("try_record_dispatch", ("release_dispatch",)),
    ),
    _theme("attempts", "STP-1", "starts of one step", _attempts, tell=numbers_given_twice),
    _theme("starts_under_claims", "STP-3", "starts under claims that are given up", _starts_under_claims),
    _theme("completions", "STP-4", "outcomes for one attempt", _completions),
    _theme("skips", "STP-5", "skips of one step", _skips),
    _theme("retries", "STP-6", "retries of one step", _retries),
    _theme("reschedules", "STP-7", "reschedulings of one step", _reschedules, Capability.RECOVERY),
    _theme("ends", "RUN-2 RUN-4", "ends of one run", _ends, tell=winners("complete_run", ("retry_step",))),
    _theme(
        "expected_ends", "RUN-2", "ends that expect the steps as they are, while these move", _expected_ends
    ),
    _theme("latches", "CTL-2", "cancels and time-outs of one run", _latches),
    _theme("keys", "IDM-2", "registrations of one idempotency key", _keys),
    _theme("triggers", "IDM-3", "triggers with one idempotency key", _triggers, Capability.TRIGGER),
    _theme("deliveries", "SIG-2 SIG-3", "deliveries of one signal", _deliveries),
    _theme(
        "expiries",
        "SIG-4",
        "deliveries to a waiter that expires",
        _expiries,
        Capability.WAITERS,
        Capability.VIRTUAL_CLOCK,
    ),
    _theme("events", "EVT-1", "events of one run", _events, Capability.EVENTS),
    _theme("outputs", "EVT-2", "outputs under one key", _outputs, Capability.OUTPUTS),
    _theme("cleanups", "RET-2 IDM-4", "cleanups of a run that others use again", _cleanups, alone=True),
    _theme("anything", "CON-1", "any operations on one run", _anything, Capability.VIRTUAL_CLOCK),
)
