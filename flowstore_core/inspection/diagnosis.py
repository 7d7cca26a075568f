"""Problems of a store that its backend and its schema show, before any run is read."""

from __future__ import annotations

from collections.abc import Iterable

from flowstore_core.backend import Diagnosable, Migratable
from flowstore_core.config import StoreConfig
from flowstore_core.diagnostics import SEVERITIES, Diagnostic, Severity
from flowstore_core.errors import SchemaVersionError
from flowstore_core.plugins import Backend, Plugin, load_error


async def diagnose_backend(
    plugin: Plugin, backend: Backend, config: StoreConfig, *, thorough: bool = False
) -> list[Diagnostic]:
    """The problems that only the backend can find, such as settings of its server.

    Opens no store. Raises BackendLoadError, with a remedy, for a missing driver.
    """
    if not isinstance(backend, Diagnosable):
        return []
    try:
        return list(await backend.diagnose(config, thorough=thorough))
    except ModuleNotFoundError as error:
        raise load_error(plugin.name, plugin.module, plugin.distribution, error) from error


async def schema_version(plugin: Plugin, backend: Migratable, config: StoreConfig) -> int:
    """The backend's schema version. Raises BackendLoadError, with a remedy, for a missing driver."""
    try:
        return await backend.schema_version(config)
    except ModuleNotFoundError as error:
        raise load_error(plugin.name, plugin.module, plugin.distribution, error) from error


async def diagnose_schema(plugin: Plugin, backend: Backend, config: StoreConfig) -> list[Diagnostic]:
    """The problem of a schema that is older or newer than this flowstore, at most one."""
    if not isinstance(backend, Migratable):
        return []
    version = await schema_version(plugin, backend, config)
    latest = max((number for number, _, _ in backend.migrations(config)), default=0)
    if 0 < version < latest:
        return [
            Diagnostic(
                code="schema-behind",
                severity=Severity.WARNING,
                summary=f"the schema has version {version}, this flowstore supports {latest}",
                meaning="A store with migrate=False refuses to open. The runs were not examined.",
                remedy="flowstore migrate up",
                prevents_open=True,
            )
        ]
    if version <= latest:
        return []
    try:
        async with backend.open(config):
            pass
    except SchemaVersionError:
        return [
            Diagnostic(
                code="schema-ahead",
                severity=Severity.ERROR,
                summary=f"the schema has version {version}, this flowstore supports {latest}",
                meaning="A newer flowstore has changed it, and this one does not support the change.",
                remedy="pip install --upgrade flowstore",
                prevents_open=True,
            )
        ]
    return [
        Diagnostic(
            code="schema-newer",
            severity=Severity.NOTE,
            summary=f"the schema has version {version}, this flowstore supports {latest}",
            meaning="A newer flowstore uses the store too. This one still supports it.",
            remedy="pip install --upgrade flowstore",
        )
    ]


def worst_first(findings: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The findings by severity, then by code."""
    return sorted(findings, key=lambda finding: (-SEVERITIES.index(finding.severity), finding.code))
