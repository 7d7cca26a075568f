"""The sources of the URL and the options, and the redaction of passwords."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from flowstore_core import ConfigurationError, InvalidArgumentError, StoreConfig, open_store
from flowstore_core.config import resolve_url


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no FLOWSTORE_URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    return tmp_path


def _config(**options: Any) -> StoreConfig:
    return StoreConfig(url="mine://x", scheme="mine", options=options, clock=None, migrate=True)


# Sources of the URL


@pytest.mark.parametrize(
    ("url", "from_file"),
    [
        ("mine://", {"user", "password", "host", "port", "database", "colour"}),
        ("mine://me@h/d", {"password", "port", "colour"}),
        ("mine://me:secret@h:5/d", {"colour"}),
        ("mine:///d?user=x", {"user", "password", "host", "port", "colour"}),
    ],
)
def test_options_in_the_authority_override_the_file(
    url: str, from_file: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("user", "password", "host", "port", "database", "colour")
    (tmp_path / "flowstore.toml").write_text("".join(f'{name} = "from the file"\n' for name in names))
    options = resolve_url(url, {}).options
    assert set(options) == from_file
    assert options.get("user") in (None, "from the file", "x")
    # A keyword overrides everything.
    assert resolve_url(url, {"user": "mine"}).options["user"] == "mine"


def test_config_the_default_is_a_file_in_the_working_directory() -> None:
    resolved = resolve_url(None, {})
    assert (resolved.url, dict(resolved.options), resolved.migrate) == ("sqlite:///flowstore.db", {}, True)


def test_config_the_argument_overrides_the_variable_the_files_and_the_default(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (working_directory / "pyproject.toml").write_text('[tool.flowstore]\nurl = "mine://pyproject"\n')
    assert resolve_url(None, {}).url == "mine://pyproject"
    (working_directory / "flowstore.toml").write_text('url = "mine://file"\n')
    assert resolve_url(None, {}).url == "mine://file"
    monkeypatch.setenv("FLOWSTORE_URL", "mine://variable")
    assert resolve_url(None, {}).url == "mine://variable"
    assert resolve_url("mine://argument", {}).url == "mine://argument"
    # An empty variable counts as unset.
    monkeypatch.setenv("FLOWSTORE_URL", "")
    assert resolve_url(None, {}).url == "mine://file"


def test_config_names_the_source_of_the_url(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "default" in resolve_url(None, {}).origin
    (working_directory / "flowstore.toml").write_text('url = "mine://file"\n')
    assert "flowstore.toml" in resolve_url(None, {}).origin
    monkeypatch.setenv("FLOWSTORE_URL", "mine://variable")
    assert "FLOWSTORE_URL" in resolve_url(None, {}).origin


async def test_config_open_store_reads_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSTORE_URL", "memory://from-the-variable")
    async with open_store() as store:
        assert store.backend == "memory"


async def test_config_open_store_reads_the_file(working_directory: Path) -> None:
    (working_directory / "flowstore.toml").write_text('url = "memory://from-the-file"\n')
    async with open_store() as store:
        assert store.backend == "memory"


async def test_config_open_store_falls_back_to_the_default_file(working_directory: Path) -> None:
    async with open_store() as store:
        assert store.backend == "sqlite"
    assert (working_directory / "flowstore.db").exists()


# Options


def test_config_a_keyword_overrides_the_query_and_the_query_overrides_the_file(
    working_directory: Path,
) -> None:
    (working_directory / "flowstore.toml").write_text(
        'url = "mine://x?b=query&c=query"\na = 1\nb = 1\nc = 1\n'
    )
    resolved = resolve_url(None, {"c": "keyword", "d": True})
    assert dict(resolved.options) == {"a": 1, "b": "query", "c": "keyword", "d": True}


def test_config_options_of_a_file_with_a_url_apply_only_to_that_url(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (working_directory / "flowstore.toml").write_text('url = "mine://file"\npool = 5\n')
    assert dict(resolve_url("mine://file", {}).options) == {"pool": 5}
    assert dict(resolve_url("mine://other", {}).options) == {}
    monkeypatch.setenv("FLOWSTORE_URL", "mine://other")
    assert dict(resolve_url(None, {}).options) == {}


def test_config_options_of_a_file_without_url_apply_to_any_url(working_directory: Path) -> None:
    (working_directory / "pyproject.toml").write_text("[tool.flowstore]\npool = 5\n")
    assert dict(resolve_url("mine://any", {}).options) == {"pool": 5}


def test_config_options_are_read_only(working_directory: Path) -> None:
    options = resolve_url("mine://x?a=1", {}).options
    with pytest.raises(TypeError):
        options["b"] = 2  # type: ignore[index]


def test_config_refuses_an_option_given_twice() -> None:
    with pytest.raises(ConfigurationError, match="pool"):
        resolve_url("mine://x?pool=1&pool=2", {})


async def test_config_the_error_for_an_unknown_option_lists_the_known_options() -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with open_store("memory://", colour="red"):
            pass
    assert "colour" in str(caught.value)
    assert "red" not in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        async with open_store("postgresql:///db?colour=red"):
            pass
    assert "colour" in str(caught.value)
    assert "pool_size" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "migrate", "options", "expected"),
    [
        ("mine://x", True, {}, True),
        ("mine://x", False, {}, False),
        ("mine://x?migrate=false", True, {}, False),
        ("mine://x?migrate=No", True, {}, False),
        ("mine://x?migrate=0", True, {}, False),
        ("mine://x?migrate=true", False, {}, False),
        ("mine://x?migrate=on", True, {}, True),
    ],
)
def test_config_migrate_is_false_if_any_source_says_false(
    url: str, migrate: bool, options: dict[str, object], expected: bool
) -> None:
    resolved = resolve_url(url, options, migrate=migrate)
    assert resolved.migrate is expected
    assert "migrate" not in resolved.options


def test_config_the_file_may_set_migrate(working_directory: Path) -> None:
    (working_directory / "flowstore.toml").write_text("migrate = false\n")
    assert resolve_url("mine://x", {}).migrate is False


def test_config_migrate_must_be_true_or_false() -> None:
    with pytest.raises(ConfigurationError, match="migrate"):
        resolve_url("mine://x?migrate=maybe", {})


# Invalid files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flowstore.toml", "url = ", "flowstore.toml"),
        ("flowstore.toml", "url = 5\n", "url"),
        ("pyproject.toml", "[tool.flowstore]\nurl = ['a']\n", "url"),
        ("pyproject.toml", "[tool]\nflowstore = 'memory://'\n", "tool.flowstore"),
        ("pyproject.toml", "[[", "pyproject.toml"),
    ],
)
def test_config_an_invalid_file_is_named(
    working_directory: Path, name: str, text: str, expected: str
) -> None:
    (working_directory / name).write_text(text)
    with pytest.raises(ConfigurationError, match=expected):
        resolve_url(None, {})


def test_config_errors_do_not_quote_an_invalid_file(working_directory: Path) -> None:
    (working_directory / "flowstore.toml").write_text('url = "postgresql://me:hunter2@host/db" hunter2\n')
    with pytest.raises(ConfigurationError) as caught:
        resolve_url(None, {})
    assert "hunter2" not in _all_texts_of(caught.value)


def test_config_a_pyproject_without_a_flowstore_table_is_ignored(working_directory: Path) -> None:
    (working_directory / "pyproject.toml").write_text("[tool.other]\nurl = 'x'\n[project]\nname = 'y'\n")
    assert resolve_url(None, {}).url == "sqlite:///flowstore.db"


@pytest.mark.parametrize("url", ["", "flows.db", "sqlite:", "sqlite:/x", "://x", "/home/me/flows.db"])
async def test_config_a_url_without_scheme_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="scheme://"):
        async with open_store(url):
            pass


@pytest.mark.parametrize("url", [5, b"memory://", Path("x"), True])
async def test_config_a_url_that_is_not_a_str_is_refused(url: Any) -> None:
    with pytest.raises(ConfigurationError, match="str"):
        async with open_store(url):
            pass


# Readers of options


@pytest.mark.parametrize(("value", "expected"), [(5, 5), ("5", 5), ("1", 1), (10, 10)])
def test_config_integer(value: object, expected: int) -> None:
    assert _config(n=value).integer("n", 3, 1, 10) == expected
    assert _config().integer("n", 3, 1, 10) == 3


@pytest.mark.parametrize("value", [0, 11, "0", "11", "x", "", 1.5, "1.5", True, None, b"5"])
def test_config_integer_refuses(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"option n .*1 to 10"):
        _config(n=value).integer("n", 3, 1, 10)


@pytest.mark.parametrize(("value", "expected"), [(5, 5.0), ("0.5", 0.5), (1.5, 1.5), ("10", 10.0)])
def test_config_seconds(value: object, expected: float) -> None:
    assert _config(n=value).seconds("n", 3, 0.1, 10) == expected


@pytest.mark.parametrize("value", [0, 10.1, "x", "", "nan", float("nan"), "inf", True, None])
def test_config_seconds_refuses(value: object) -> None:
    with pytest.raises(ConfigurationError, match="option n"):
        _config(n=value).seconds("n", 3, 0.1, 10)


@pytest.mark.parametrize("value", [True, "true", "Yes", "ON", "1"])
def test_config_flag(value: object) -> None:
    assert _config(n=value).flag("n", False) is True


@pytest.mark.parametrize("value", [False, "false", "No", "OFF", "0"])
def test_config_flag_off(value: object) -> None:
    assert _config(n=value).flag("n", True) is False


@pytest.mark.parametrize("value", ["", "maybe", 1, 0, None])
def test_config_flag_refuses(value: object) -> None:
    with pytest.raises(ConfigurationError, match="option n"):
        _config(n=value).flag("n", True)


def test_config_choice() -> None:
    allowed = ("FULL", "NORMAL")
    assert _config().choice("n", "FULL", allowed) == "FULL"
    assert _config(n="normal").choice("n", "FULL", allowed) == "NORMAL"
    for value in ("OFF", "", 1, None):
        with pytest.raises(ConfigurationError, match="FULL, NORMAL"):
            _config(n=value).choice("n", "FULL", allowed)


def test_config_from_url() -> None:
    config = StoreConfig.from_url("mine://me@host/data?colour=red")
    assert (config.scheme, dict(config.options)) == ("mine", {"colour": "red"})
    assert (config.parts.path, config.clock, config.migrate) == ("data", None, True)


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(b"")
    assert _config(cacert=str(path)).file("cacert") == path
    assert _config().file("cacert") is None
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigurationError, match="option cacert cannot be read"):
            _config(cacert=str(missing)).file("cacert")


def test_config_text() -> None:
    assert _config(n="x").text("n", "y") == "x"
    assert _config().text("n", "y") == "y"
    for value in ("", 1, None, True):
        with pytest.raises(ConfigurationError, match="option n"):
            _config(n=value).text("n", "y")


# Passwords

SECRETS = ["hunter2", "p@ss", "a:b", "a/b", "a?b", "a#b", "a&b=c", "p%40ss", "@@", "ünï", "a b", "[x]", "://"]


@pytest.mark.parametrize("secret", SECRETS)
def test_config_no_repr_shows_a_password(secret: str) -> None:
    secret = f"{secret}S3cr3t"
    encoded = quote(secret, safe="")
    url = f"mine://me:{encoded}@host/db?password={encoded}"
    config = StoreConfig(
        url=url, scheme="mine", options={"password": secret}, clock=lambda: datetime.now(UTC), migrate=True
    )
    assert "S3cr3t" not in f"{config!r} {config}"
    assert "S3cr3t" not in repr(resolve_url(url, {"token": secret}))


@pytest.mark.parametrize(
    "url",
    [
        "nobody://me:S3cr3t@host/db?password=S3cr3t",
        "memory://me:S3cr3t@host/db",
        "memory://?S3cr3t",
        "postgresql://me:S3cr3t@host/db?colour=S3cr3t",
        "postgresql://me:S3cr3t@host/db?colour=S3cr3t&colour=S3cr3t",
        "postgresql://me:S3cr3t@host/db?pool_size=S3cr3t",
        "sqlite://me:S3cr3t@host/db",
    ],
)
async def test_config_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with open_store(url):
            pass
    if url != "memory://?S3cr3t":
        # In this URL the secret is the name of an option.
        assert "S3cr3t" not in _all_texts_of(caught.value)


def _all_texts_of(error: BaseException | None) -> str:
    texts = ""
    while error is not None:
        texts += f"{error} {error!r} {error.__dict__} "
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return texts


# The clock


@pytest.mark.parametrize("clock", [5, "now", datetime(2026, 3, 14, tzinfo=UTC)])
async def test_config_a_clock_must_be_callable(clock: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        async with open_store("memory://", clock=clock):
            pass
    assert caught.value.argument == "clock"
