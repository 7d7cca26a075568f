"""The results of a program: samples, measures, ratios, and their JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

Statistic = Literal["rate", "p50_ms", "p99_ms", "p999_ms", "value"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One variant in one round."""

    work: int
    """Number of units of work, as verified afterwards."""
    rate: float | None = None
    """Units per second."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    """Latency of one call, in milliseconds."""
    p999_ms: float | None = None
    value: float | None = None
    """The value of a measure that is not a rate, in the measure's unit."""


@dataclass(slots=True)
class Result:
    """One variant of a measure, over all rounds."""

    variant: str
    samples: list[Sample] = field(default_factory=list)

    def values(self, statistic: Statistic) -> list[float]:
        found = (getattr(sample, statistic) for sample in self.samples)
        return [value for value in found if value is not None]

    def median(self, statistic: Statistic) -> float | None:
        values = self.values(statistic)
        return median(values) if values else None


@dataclass(slots=True)
class Measure:
    """One measure with the results of all variants."""

    name: str
    unit: str
    """The unit counted per second, or the unit of the values."""
    results: list[Result] = field(default_factory=list)
    note: str = ""

    def result(self, variant: str) -> Result:
        for result in self.results:
            if result.variant == variant:
                return result
        raise KeyError(f"{self.name} has no variant {variant}")


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure compared with its target: the ratio of ours to the baseline's, or a plain value."""

    name: str
    value: float
    lowest: float
    highest: float
    """Lowest and highest ratio of single rounds."""
    target: float | None
    """None: compared with a theoretical limit."""
    aim: float | None
    at_least: bool
    """Whether more is better."""
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(slots=True)
class Report:
    """The complete result of one program."""

    program: str
    machine: Mapping[str, str]
    settings: Mapping[str, str]
    measures: list[Measure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(self, name: str) -> Measure | None:
        return next((measure for measure in self.measures if measure.name == name), None)

    def derive(self, name: str, new_name: str, unit: str, statistic: Statistic) -> None:
        """Add a measure from another statistic of an existing measure."""
        source = self.measure(name)
        if source is None:
            return
        results = [
            Result(
                one.variant,
                [Sample(sample.work, value=getattr(sample, statistic)) for sample in one.samples],
            )
            for one in source.results
        ]
        self.measures.append(Measure(new_name, unit, results))

    def judge(self, targets: Iterable[Target]) -> None:
        """Compare the measures with their targets; targets without a measure are skipped."""
        for target in targets:
            ratio = target.judge(self)
            if ratio is not None:
                self.ratios.append(ratio)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> Report:
    """Read a report written by ``Report.save``."""
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    measures = [
        Measure(
            one["name"],
            one["unit"],
            [Result(r["variant"], [Sample(**s) for s in r["samples"]]) for r in one["results"]],
            one["note"],
        )
        for one in raw["measures"]
    ]
    return Report(
        raw["program"],
        raw["machine"],
        raw["settings"],
        measures,
        [Ratio(**one) for one in raw["ratios"]],
        raw["notes"],
    )


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a ratio."""

    name: str
    measure: str
    ours: str
    theirs: str | None
    """None: the target applies to our figure itself."""
    at_least: bool
    target: float | None
    """None: theirs is a theoretical limit."""
    aim: float | None = None
    statistic: Statistic = "rate"
    unit: str = "x"

    def judge(self, report: Report) -> Ratio | None:
        """The ratio of the medians, or None without the measure."""
        measure = report.measure(self.measure)
        if measure is None:
            return None
        ours = measure.result(self.ours).values(self.statistic)
        if self.theirs is None:
            return self._ratio(median(ours), ours)
        theirs = measure.result(self.theirs).values(self.statistic)
        rounds = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        return self._ratio(median(ours) / median(theirs), rounds)

    def _ratio(self, value: float, rounds: Sequence[float]) -> Ratio:
        return Ratio(
            self.name, value, min(rounds), max(rounds), self.target, self.aim, self.at_least, self.unit
        )
