"""Interleaved rounds: each round measures all variants once."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks import tables
from benchmarks.options import Options, say
from benchmarks.results import Measure, Report, Result, Sample

Round = Callable[[int], Awaitable[Sample]]
"""Does, times and verifies a number of units of work, on prepared rows."""


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    round: Round


def sweep() -> None:
    """Collect garbage, and freeze the remaining objects.

    All variants share one process. Without freezing, full collections over the objects of all variants took
    an eighth of the time of some.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _scaled(amount: int, options: Options) -> int:
    """The minimum amount, reduced for scales below 1."""
    return max(1, int(amount * min(1.0, options.scale)))


async def measure(
    report: Report,
    options: Options,
    name: str,
    unit: str,
    variants: Sequence[Variant],
    *,
    least: int,
    note: str = "",
    settle: Callable[[], Awaitable[None]] | None = None,
    warm_up: bool = True,
) -> None:
    """Warm up all variants, then measure the rounds, each starting with a different variant.

    The amount of work follows from the previous rate, so that all variants take about the same time;
    ``least`` is the minimum, and the amount of variants without a rate. ``settle`` runs untimed before each
    measurement. ``warm_up=False`` is for variants that warm up themselves and ignore the amount.
    """
    if not options.wants(name):
        return
    least = _scaled(least, options)
    amounts: dict[str, int] = {}
    results = {variant.name: Result(variant.name) for variant in variants}

    async def take(variant: Variant, amount: int, where: str) -> Sample:
        if settle is not None:
            await settle()
        # The garbage of one variant must not slow down the next.
        sweep()
        sample = await variant.round(amount)
        figure = sample.value
        if sample.rate is not None:
            amounts[variant.name] = max(least, int(sample.rate * options.seconds))
            figure = sample.rate
        say(f"{name}, {where}: {variant.name} {tables.number(figure)} {unit}")
        return sample

    for variant in variants:
        amounts[variant.name] = least
        if warm_up:
            await take(variant, least, "warm-up")
    for index in range(options.rounds):
        shift = index % len(variants)
        for variant in (*variants[shift:], *variants[:shift]):
            found = await take(variant, amounts[variant.name], f"round {index + 1}/{options.rounds}")
            results[variant.name].samples.append(found)
    report.measures.append(Measure(name, unit, list(results.values()), note))


async def measure_paired(
    report: Report,
    options: Options,
    name: str,
    unit: str,
    variants: Sequence[str],
    round_of_all: Callable[[int], Awaitable[Sequence[Sample]]],
    *,
    least: int,
    note: str = "",
) -> None:
    """Measure rounds in which variants alternate call by call; ``round_of_all`` returns one sample each."""
    if not options.wants(name):
        return
    results = [Result(variant) for variant in variants]
    amount = least = _scaled(least, options)
    for number in range(-1, options.rounds):
        sweep()
        found = await round_of_all(amount)
        slowest = min(sample.rate or 1.0 for sample in found)
        amount = max(least, int(slowest * options.seconds / len(variants)))
        where = f"round {number + 1}/{options.rounds}" if number >= 0 else "warm-up"
        say(f"{name}, {where}: {', '.join(f'{sample.p50_ms:.3f} ms' for sample in found)}")
        if number >= 0:
            for result, sample in zip(results, found, strict=True):
                result.samples.append(sample)
    report.measures.append(Measure(name, unit, results, note))
