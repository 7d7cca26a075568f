"""The descriptor of a backend, as a type checker sees it; never executed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta

from flowstore_core import Capability
from flowstore_core.backend import (
    Backend,
    BatchedOperation,
    Batcher,
    Describable,
    Diagnosable,
    Diagnostic,
    FaultInjectable,
    FaultInjector,
    Fixable,
    Limited,
    Migratable,
    NonDurableUrls,
    OutageInjectable,
    OutageInjector,
    SchemaRevertible,
    SchemaVersionAdjustable,
    ScratchClearable,
    Severity,
    SharedClock,
    ShieldedTasks,
    StoreConfig,
    StoreLimits,
    StoreUrl,
    VariantUrls,
    WriteFailable,
    WriteFailureInjector,
    hookimpl,
    orphaned_rows,
)


class Store:
    async def ping(self) -> None: ...


class Descriptor:
    """A backend with every optional member."""

    name = "mine"
    schemes = frozenset({"mine"})
    capabilities = frozenset({Capability.DURABLE})
    options = frozenset({"timeout"})
    contract_version = 1
    limits = StoreLimits(run_steps=50_000)
    max_skew = timedelta(seconds=1)

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[Store]:
        parts: StoreUrl = config.parts
        assert parts.hosts
        seconds: float = config.seconds("timeout", 1.0, 0.0, 60.0)
        assert seconds
        yield Store()

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        yield url

    def migrations(self, config: StoreConfig) -> Sequence[tuple[int, str, str]]:
        return [(1, "initial", "")]

    async def schema_version(self, config: StoreConfig) -> int:
        return 1

    async def migrate(self, config: StoreConfig) -> int:
        return 1

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        return {"size": "1 MiB"}

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        found = orphaned_rows("steps", [], never_started=False, limit=10)
        return [found] if found.severity is Severity.ERROR else []

    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
        return [finding.fix for finding in findings if finding.fix is not None]

    def variants(self, url: str) -> Mapping[str, str]:
        return {"pool of one": f"{url}?pool=1"}

    def non_durable_urls(self, url: str) -> Sequence[str]:
        return [f"{url}?sync=off"]

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[FaultInjector]:
        yield Injector()

    @asynccontextmanager
    async def inject_write_failures(self, url: str) -> AsyncIterator[WriteFailureInjector]:
        yield WriteInjector()

    @asynccontextmanager
    async def inject_outages(self, url: str) -> AsyncIterator[OutageInjector]:
        yield Outages()

    @asynccontextmanager
    async def adjust_schema_version(self, url: str, difference: int) -> AsyncIterator[None]:
        yield

    def earlier_schema_versions(self) -> Sequence[int]:
        return [1]

    async def revert_schema(self, url: str, version: int) -> None: ...

    async def clear_scratch(self, url: str) -> None: ...


class Injector:
    url = "mine://proxy"

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None: ...

    def refuse_request(self, *, skip: int = 0) -> None: ...

    def hold_request(self, *, skip: int = 0) -> None: ...

    async def release_request(self) -> None: ...

    def disarm(self) -> bool:
        return False


class WriteInjector:
    url = "mine://full"

    def fail(self, *, skip: int = 0) -> None: ...

    def stop(self) -> bool:
        return False


class Outages:
    url = "mine://proxy"
    interruptions: Mapping[str, Callable[[], AbstractAsyncContextManager[None]]] = {}

    @asynccontextmanager
    async def lock(self) -> AsyncIterator[None]:
        yield


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [Descriptor()]


limited: Limited = Descriptor()
shared_clock: SharedClock = Descriptor()
migratable: Migratable = Descriptor()
describable: Describable = Descriptor()
diagnosable: Diagnosable = Descriptor()
fixable: Fixable = Descriptor()
with_variants: VariantUrls = Descriptor()
non_durable: NonDurableUrls = Descriptor()
fault_injectable: FaultInjectable = Descriptor()
write_failable: WriteFailable = Descriptor()
outage_injectable: OutageInjectable = Descriptor()
version_adjustable: SchemaVersionAdjustable = Descriptor()
schema_revertible: SchemaRevertible = Descriptor()
scratch_clearable: ScratchClearable = Descriptor()
not_a_backend: Backend = Store()  # type: ignore[assignment]


class Claims:
    def __init__(self) -> None:
        self._tasks = ShieldedTasks()
        batcher = Batcher(workers=2)
        self._claim: BatchedOperation[str, bool] = batcher.operation("try_claim_step", self._run, keyed=True)

    async def claim(self, key: str) -> bool:
        return await self._claim.submit(key, key)

    async def _run(self, keys: Sequence[str]) -> Sequence[bool | Exception]:
        return [True for _ in keys]
