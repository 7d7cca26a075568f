"""Variants: the suite opens stores with the options that a backend lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from flowstore_conformance import Report, Status, run_suite, suite
from flowstore_conformance.context import DEFAULT_VARIANT, CheckContext, ContractViolation, Profile
from flowstore_conformance.registry import Check, all_checks
from flowstore_conformance.rendering import render_json, render_markdown, render_page, render_text
from flowstore_conformance.results import CheckResult
from flowstore_conformance.suite import Variants, run_check

from flowstore_core import Capability, ConfigurationError
from flowstore_core.backend import NonDurableUrls, VariantUrls
from flowstore_core.plugins import find_backend
from flowstore_core.urls import parse_url
from flowstore_sqlite.plugin import SqliteBackend
from tests.conformance_reports import example_check, passes

ONE_READER = "one reader"


class Recorder:
    """Checks that record the variant and the options of their stores."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str | None, str | None]] = {}

    def check(self, name: str) -> Check:
        async def run(context: CheckContext) -> None:
            self.seen[name] = (context.variant, parse_url(context.url).options.get("readers"))
            await passes(context)

        return example_check("RUN-1", name, run)


async def run(tmp_path: Path, *checks: Check, **options: Any) -> Report:
    url = f"sqlite:///{tmp_path}/flows.db"
    return await run_suite(url, profile="quick", checks=checks, repeats=0, **{"seed": 7, **options})


async def test_the_seed_chooses_among_all_variants(tmp_path: Path) -> None:
    recorder = Recorder()
    checks = [recorder.check(f"check_{number}") for number in range(12)]
    report = await run(tmp_path, *checks)
    assert set(recorder.seen.values()) == {(DEFAULT_VARIANT, None), (ONE_READER, "1")}
    first = dict(recorder.seen)
    await run(tmp_path, *checks)
    assert recorder.seen == first
    assert report.variants == (DEFAULT_VARIANT, ONE_READER)


@pytest.mark.parametrize(("variant", "readers"), [(DEFAULT_VARIANT, None), (ONE_READER, "1")])
async def test_one_variant_can_be_chosen(tmp_path: Path, variant: str, readers: str | None) -> None:
    recorder = Recorder()
    await run(tmp_path, *(recorder.check(f"check_{number}") for number in range(6)), variant=variant)
    assert set(recorder.seen.values()) == {(variant, readers)}


async def test_a_check_that_its_variant_cannot_run_uses_the_options_of_the_url(
    monkeypatch: pytest.MonkeyPatch, postgresql_url: str
) -> None:
    seen: list[str | None] = []

    async def record(context: CheckContext) -> None:
        seen.append(context.variant)
        await passes(context)

    async def run_alone(self: suite.SuiteRun, check: Check) -> CheckResult:
        raise AssertionError(f"{check.name} did not pass in a lane")

    monkeypatch.setattr(suite.SuiteRun, "check", run_alone)
    # Enough for lanes.
    checks = [
        example_check("WAT-1", f"check {number}", record, needs=[Capability.WATCH])
        for number in range(suite.LANES + 4)
    ]
    monkeypatch.setattr(suite, "all_checks", lambda: checks)
    report = await run_suite(postgresql_url, profile="quick", seed=7, processes=1)
    chosen = Variants(find_backend("postgresql")[1], postgresql_url, 7)
    assert "pgbouncer" in {chosen.of(check) for check in checks}
    assert {result.status for result in report.results} == {Status.PASS}
    assert len(seen) == len(checks)
    assert set(seen) <= {DEFAULT_VARIANT, "pool of one"}


async def test_a_failure_names_its_variant_in_every_report(tmp_path: Path) -> None:
    async def breaks(context: CheckContext) -> None:
        raise ContractViolation("two winners")

    report = await run(tmp_path, example_check("CLM-1", "broken", breaks), variant=ONE_READER)
    (result,) = report.results
    assert (result.status, result.variant) == (Status.FAIL, ONE_READER)
    assert "--variant 'one reader'" in report.command(result)
    for text in (render_text(report), render_json(report), render_markdown(report), render_page(report)):
        assert ONE_READER in text.replace("&#x27;", "'").split("Repeat")[0]


async def test_the_error_for_an_unknown_variant_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no variant 'small'.*'default', 'one reader'"):
        await run(tmp_path, example_check("RUN-1", "one", passes), variant="small")


async def test_a_backend_without_variants_has_none() -> None:
    report = await run_suite("memory://", profile="quick", checks=[example_check("RUN-1", "one", passes)])
    assert report.variants == ()
    assert report.results[0].variant is None
    assert "variant" not in render_text(report)


def test_half_of_the_checks_have_a_variant_and_those_that_share_a_namespace_the_same() -> None:
    backend = find_backend("postgresql")[1]
    others = set()
    for seed in range(20):
        variants = Variants(backend, "postgresql://host/database", seed)
        chosen = Counter(variants.of(check) for check in all_checks() if not check.isolated)
        assert 0.3 < chosen.pop(DEFAULT_VARIANT) / chosen.total() < 3
        (other,) = chosen
        others.add(other)
    assert others == {"pool of one", "pgbouncer"}


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("sqlite:///flows.db", {ONE_READER}),
        ("postgresql://host/database?schema=mine", {"pool of one", "pgbouncer"}),
    ],
)
def test_variants_of_the_built_in_backends_keep_the_other_options(url: str, names: set[str]) -> None:
    backend = find_backend(parse_url(url).scheme)[1]
    assert isinstance(backend, VariantUrls)
    variants = backend.variants(url)
    assert set(variants) == names
    for variant in variants.values():
        assert parse_url(url).options.items() < parse_url(variant).options.items()


def test_the_page_lists_the_variants_of_the_built_in_backends() -> None:
    page = (Path(__file__).parents[1] / "docs/conformance.md").read_text()
    for scheme in ("sqlite", "postgresql"):
        backend = find_backend(scheme)[1]
        assert isinstance(backend, VariantUrls)
        names = ", ".join(f"`{name}`" for name in backend.variants(f"{scheme}://host/database"))
        assert f"| {backend.name} | {names} |" in page


class ClaimsDurability(SqliteBackend):
    """Has DURABLE with an option that gives it up."""

    def non_durable_urls(self, url: str) -> Sequence[str]:
        return [url]


async def test_an_option_without_an_effect_on_the_capabilities_is_found(tmp_path: Path) -> None:
    backend = ClaimsDurability()
    assert isinstance(backend, NonDurableUrls)
    (check,) = [check for check in all_checks() if check.name == "stored_data_outlives_every_store"]
    result = await run_check(check, f"sqlite:///{tmp_path}/flows.db", backend, Profile.QUICK, 7)
    assert result.failure is not None
    assert result.failure.clause == "CON-5"
    assert "declares DURABLE" in result.failure.message
