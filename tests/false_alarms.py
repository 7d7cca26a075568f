"""Run the suite on the correct built-in backends with many seeds: ``python -m tests.false_alarms``.

Every FAIL and INCONCLUSIVE is a false alarm; it is printed with its seed and message, and the exit code is 1.
``--hogs N`` runs N processes beside it that only use CPU. ``--variant NAME`` selects a variant of the
backends that have it.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flowstore_conformance import Profile, Report, run_suite

from flowstore_core.backend import VariantUrls
from flowstore_core.plugins import find_backend
from tests.cluster import Cluster

BACKENDS = ("memory", "sqlite", "postgresql")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.false_alarms", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="the number of seeds")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="default: all")
    parser.add_argument("--profile", default="quick", choices=[profile.value for profile in Profile])
    parser.add_argument("--check", action="append", default=[], help="only the check of this name")
    parser.add_argument("--hogs", type=int, default=0, help="processes that use CPU meanwhile")
    parser.add_argument("--variant")
    arguments = parser.parse_args()
    backends = arguments.backend or BACKENDS
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs = alarms = 0
    with ExitStack() as stack:
        stack.enter_context(cpu_hogs(arguments.hogs))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        urls = {"memory": "memory://", "sqlite": f"sqlite:///{folder}/flows.db"}
        if "postgresql" in backends:
            cluster = Cluster()
            stack.callback(cluster.stop)
            urls["postgresql"] = cluster.url
        for seed in seeds:
            for backend in backends:
                url = urls[backend]
                report = asyncio.run(
                    run_suite(
                        url,
                        profile=arguments.profile,
                        seed=seed,
                        check_names=arguments.check,
                        variant=arguments.variant if has_variant(url, arguments.variant) else None,
                    )
                )
                found = alarms_of(report)
                runs, alarms = runs + 1, alarms + len(found)
                sys.stdout.write(
                    f"{backend} seed {seed}: {len(found) or 'no'} false alarms, {report.seconds:.0f} s\n"
                )
                sys.stdout.writelines(f"    {alarm}\n" for alarm in found)
                sys.stdout.flush()
    sys.stdout.write(f"{alarms} false alarms in {runs} runs\n")
    return 1 if alarms else 0


def has_variant(url: str, name: str | None) -> bool:
    backend = find_backend(url.partition(":")[0])[1]
    return isinstance(backend, VariantUrls) and name in backend.variants(url)


def alarms_of(report: Report) -> list[str]:
    """The results of a run that a correct backend must not have."""
    found = [
        f"FAIL {one.failure.clause} {one.check.name}: {one.failure.message}"
        for one in report.results
        if one.failure is not None
    ]
    found += [
        f"{one.status} {one.check.name}: {one.reason}"
        for one in report.results
        if one.status.value in ("INCONCLUSIVE", "NOT RUN")
    ]
    return found


@contextmanager
def cpu_hogs(count: int) -> Iterator[None]:
    """Run processes that only use CPU."""
    context = multiprocessing.get_context("spawn")
    hogs = [context.Process(target=_use_cpu, daemon=True) for _ in range(count)]
    try:
        for hog in hogs:
            hog.start()
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.join()


def _use_cpu() -> None:
    until = time.monotonic() + 24 * 3600
    while time.monotonic() < until:
        pass


if __name__ == "__main__":
    sys.exit(main())
