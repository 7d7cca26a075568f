"""The examples again, on a store that reads its own clock.

The other checks give the store a virtual clock. A backend may use other statements without one, as most
programs do.
"""

from __future__ import annotations

from dataclasses import replace

from flowstore_conformance.checks.example_checks import examples_without_virtual_clock, run_examples
from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.context import CheckContext, ContractViolation, Profile
from flowstore_conformance.registry import check
from flowstore_core import Capability

QUICK = ("CLM-",)
"""Prefixes of the clauses of which the quick profile runs half of the examples: the most frequent calls."""
MORE = (*QUICK, "STP-", "SIG-", "EVT-", "RUN-")
"""Prefixes of the clauses. Outside of QUICK the standard profile runs half of the examples."""
EXAMPLES = {
    clause: runs for clause, runs in examples_without_virtual_clock().items() if clause.startswith(MORE)
}


@check(*EXAMPLES, needs=[Capability.VIRTUAL_CLOCK], isolated=False)
async def examples_hold_on_the_clock_of_the_store(context: CheckContext) -> None:
    """Examples that need no virtual clock also pass on a store that was opened without one."""
    store = await context.open(clock=None)
    real = replace(context, store=store, clock=None)
    for clause, runs in EXAMPLES.items():
        is_frequent = clause.startswith(QUICK)
        if context.profile is Profile.QUICK and not is_frequent:
            continue
        if CLAUSES[clause].needs not in (None, *context.capabilities):
            continue
        try:
            if context.profile is (Profile.QUICK if is_frequent else Profile.STANDARD):
                runs = context.random.sample(runs, (len(runs) + 1) // 2)
            await run_examples(real, runs, skips_missing=True)
        except ContractViolation as found:
            raise ContractViolation(found.message, clause=found.clause or clause) from found.__cause__
    context.assertions += real.assertions
