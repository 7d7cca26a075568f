"""Random call sequences, compared with the model call by call; failures are shrunk.

Two searches complement each other: seeded random numbers draw long sequences that reach deep states, and
Hypothesis's state machine draws and varies shorter ones. Drawing depends only on the model, never on the
store's results, so every sequence can be reproduced.

Creating a namespace costs more than a sequence, so sequences share one. Each has its own ids, and its end
completes its runs, advances the clock and cleans up, after which the store must be empty. Global reads are
therefore compared exactly too. After a failure the namespace is replaced.
"""

from __future__ import annotations

import random
import time

from flowstore_conformance.checks.fixtures import second_store
from flowstore_conformance.context import CheckContext
from flowstore_conformance.differential import CallSequence, ModelMismatch, shrink
from flowstore_conformance.operations import available_strategies, draw_call, draw_clock_advance
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.strategies import KEYS, RandomChoices
from flowstore_core import Capability
from flowstore_core.operations import OPERATIONS

SHRINK_SECONDS = 6.0
SEQUENCE_LENGTH = 80
"""Calls of a random sequence."""
COMPARE_INTERVAL = 8
"""Number of calls between two comparisons of the whole state."""
REPEATED_READS = 3
"""Number of reads that a random sequence repeats, with the same arguments, around its writes."""
TWO_STORES_INTERVAL = 3
"""Every so many random sequences use two stores of the namespace instead of one."""


@check("CON-1", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.MODEL, isolated=False, rotation="call sequences")
async def call_sequences_agree_with_the_model(context: CheckContext) -> None:
    """Long random call sequences on one or two stores get the model's results and leave the model's state.

    Some reads are repeated around the writes, so that a stale cache shows.
    """
    until = time.monotonic() + context.profile.of(2, 6, 900)
    # So many are tried on a slow machine too.
    minimum = context.profile.of(3, 6, 60)
    async with context.new_namespace() as namespace:
        second = await second_store(namespace)
        try:
            for number in range(1, context.profile.of(5, 60, 5000)):
                other = None if number % TWO_STORES_INTERVAL else second
                program = CallSequence.on(namespace, number, second=other)
                await _run_random_sequence(program, context.random)
                if number >= minimum and time.monotonic() > until:
                    break
        except ModelMismatch as found:
            raise await shrink(context, found, SHRINK_SECONDS) from found.__cause__


async def _run_random_sequence(program: CallSequence, generator: random.Random) -> None:
    choices = RandomChoices(generator)
    methods = available_strategies(program.context.capabilities)
    # Swarm testing: omitting some operations and favouring others reaches states that a uniform
    # mixture does not.
    weights = [one.weight * generator.choice((0, 1, 1, 2, 4)) for one in methods.values()]
    program.universe.keys = generator.sample(KEYS, generator.choice((1, 2, 2, 4)))
    for _ in range(generator.choice((1, 2))):
        await program.call(draw_call(choices, program.universe, "start_run"))
    reads = [method for method in methods if not OPERATIONS[method].writes]
    repeated = [
        draw_call(choices, program.universe, read) for read in generator.sample(reads, REPEATED_READS)
    ]
    stores = range(len(program.stores))
    for number in range(SEQUENCE_LENGTH):
        if generator.random() < 0.15:
            program.advance_clock(draw_clock_advance(choices, program.universe))
        [method] = generator.choices(list(methods), weights)
        call = draw_call(choices, program.universe, method)
        await program.call(call, store=generator.choice(stores))
        if call.operation.writes:
            await program.call(generator.choice(repeated), store=generator.choice(stores))
        else:
            repeated[generator.randrange(REPEATED_READS)] = call
        if number % COMPARE_INTERVAL == 0:
            await program.compare_state()
    await program.finish()


@check("CON-1", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.MODEL, isolated=False, rotation="call sequences")
async def hypothesis_calls_agree_with_the_model(context: CheckContext) -> None:
    """Call sequences that Hypothesis draws and varies get the model's results and leave the model's state."""
    # Here, because importing Hypothesis takes longer than most checks.
    from flowstore_conformance.hypothesis_search import search

    of = context.profile.of
    found = await search(
        context,
        examples=of(1, 60, 2000),
        steps=of(20, 40, 50),
        seconds=of(1, 6, 300),
        shrink_seconds=SHRINK_SECONDS,
    )
    if found is not None:
        raise await shrink(context, found, SHRINK_SECONDS) from found.__cause__
