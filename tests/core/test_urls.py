"""The parser of store URLs: it decodes every part once, drops nothing and shows no password."""

from __future__ import annotations

import traceback
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flowstore_core import ConfigurationError, FlowStoreError, StoreConfig, open_store
from flowstore_core.urls import StoreUrl, parse_url, redact


def _parts(url: str) -> tuple[str, str, str, str, str, dict[str, str]]:
    parsed = parse_url(url)
    return parsed.scheme, parsed.user, parsed.password, parsed.hosts, parsed.path, dict(parsed.options)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("mine://", ("mine", "", "", "", "", {})),
        ("MINE://Host", ("mine", "", "", "Host", "", {})),
        ("mine:///a/b.db", ("mine", "", "", "", "a/b.db", {})),
        ("mine:////a/b.db", ("mine", "", "", "", "/a/b.db", {})),
        ("mine:///a%20b%23c%2541.db?x=1", ("mine", "", "", "", "a b#c%41.db", {"x": "1"})),
        ("mine:///100% done", ("mine", "", "", "", "100% done", {})),
        ("mine:///%C3%A9/%FF", ("mine", "", "", "", "é/\udcff", {})),
        ("mine:///", ("mine", "", "", "", "", {})),
        ("mine:///me@home/a.db", ("mine", "", "", "", "me@home/a.db", {})),
        ("mine://me@h", ("mine", "me", "", "h", "", {})),
        ("mine://m%3Ae:p%40%2F:@h:1,[::1]:2/d", ("mine", "m:e", "p@/:", "h:1,[::1]:2", "d", {})),
        ("mine://me:p@ss@h%2C:1/d", ("mine", "me", "p@ss", "h%2C:1", "d", {})),
        (
            "mine://h/d?a=1%262&b=&c=%C3%A9+e&d",
            ("mine", "", "", "h", "d", {"a": "1&2", "b": "", "c": "é e", "d": ""}),
        ),
        ("mine://h/d?user=me@home", ("mine", "", "", "h", "d", {"user": "me@home"})),
        ("mine://h/d?a=?/", ("mine", "", "", "h", "d", {"a": "?/"})),
    ],
)
def test_urls_every_part_is_decoded_once(url: str, parts: tuple[Any, ...]) -> None:
    assert _parts(url) == parts


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("mine:///C#/a.db?migrate=false", ("mine", "", "", "", "C#/a.db", {"migrate": "false"})),
        ("mine:///a.db#?x=1", ("mine", "", "", "", "a.db#", {"x": "1"})),
        ("mine:///a.db?x=1#2&y=3", ("mine", "", "", "", "a.db", {"x": "1#2", "y": "3"})),
        ("mine://me:p#w@h#/d", ("mine", "me", "p#w", "h#", "d", {})),
    ],
)
def test_urls_a_hash_is_an_ordinary_character(url: str, parts: tuple[Any, ...]) -> None:
    assert _parts(url) == parts


@pytest.mark.parametrize("around", ["\n", "\r\n", " ", "\t", "\f", "\v", "\xa0", " \n\n"])
def test_urls_whitespace_around_a_url_is_ignored(around: str) -> None:
    plain = "mine://me:pw@h/d?a=1"
    for url in (f"{plain}{around}", f"{around}{plain}", f"{around}{plain}{around}"):
        assert parse_url(url) == parse_url(plain)
        assert parse_url(url).text == plain
        assert redact(url) == redact(plain)


@pytest.mark.parametrize("control", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85"])
@pytest.mark.parametrize("url", ["mine:///a{}b", "mine://me:p{}w@h/d", "mine://h{}i/d", "mine://h/d?a=b{}c"])
def test_urls_a_control_character_inside_a_url_is_refused(control: str, url: str) -> None:
    with pytest.raises(ConfigurationError, match="control characters"):
        parse_url(url.format(control))


@pytest.mark.parametrize("url", ["mine:///a%0Ab%00", "mine:///d?a=%0A"])
def test_urls_an_encoded_control_character_is_kept(url: str) -> None:
    parsed = parse_url(url)
    assert "\n" in parsed.path + parsed.options.get("a", "")


@pytest.mark.parametrize(
    "url", ["", " ", "flows.db", "sqlite:", "sqlite:/x", "://x", "/home/me/flows.db", "a b://x"]
)
def test_urls_without_a_scheme_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="scheme://"):
        parse_url(url)


@pytest.mark.parametrize("url", ["mine://m%FFe@h", "mine://me:%FF@h", "mine://h?a=%FF"])
def test_urls_a_part_that_is_not_utf_8_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="does not decode to UTF-8"):
        parse_url(url)


SPECIAL = "#/?@:% &=+,[]{}\\'\"<>|^`~é\N{SNOWMAN}"
PASSWORDS = st.text(st.sampled_from(SPECIAL + "aZ09"), min_size=1, max_size=12).map(str.strip).filter(bool)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(user=TEXTS, password=TEXTS, path=TEXTS, value=TEXTS)
def test_urls_encoded_values_round_trip(user: str, password: str, path: str, value: str) -> None:
    quoted = [quote(text, safe="") for text in (user, password, path, value)]
    parsed = parse_url("mine://{}:{}@h:1/{}?option={}".format(*quoted))
    assert (parsed.user, parsed.password, parsed.hosts, parsed.path) == (user, password, "h:1", path)
    assert parsed.options == {"option": value}
    reparsed = parse_url(parsed.with_options({"other": value}))
    assert (reparsed.password, reparsed.path, reparsed.options) == (password, path, {"other": value})
    changed = parse_url(parsed.with_more_options({"option": path, "other": value}))
    assert (changed.password, changed.options) == (password, {"option": path, "other": value})


@given(path=TEXTS, other=TEXTS)
def test_urls_with_path_replaces_only_the_path(path: str, other: str) -> None:
    parsed = parse_url(f"mine://me:p%40@h/{quote(path, safe='')}?a=b%26")
    changed = parse_url(parsed.with_path(other))
    assert changed.path == other
    assert (changed.user, changed.password, changed.hosts, changed.options) == ("me", "p@", "h", {"a": "b&"})


# Passwords

MARK = "S3cr3t"
ENCODED = "must be percent-encoded"


def _all_texts_of(error: BaseException | None) -> str:
    texts = "".join(traceback.format_exception(error)) if error is not None else ""
    while error is not None:
        texts += f"{error} {error!r} {error.__dict__} "
        error = error.__cause__ or error.__context__
    return texts


@pytest.mark.parametrize("character", "/?@:%#")
def test_urls_an_unencoded_special_character_in_a_password_is_kept_or_refused(character: str) -> None:
    url = f"postgresql://me:{MARK}{character}x{MARK}@host/db"
    if character in "/?":
        with pytest.raises(ConfigurationError, match=ENCODED) as caught:
            parse_url(url)
        assert MARK not in _all_texts_of(caught.value)
    else:
        parsed = parse_url(url)
        assert (parsed.password, parsed.hosts) == (f"{MARK}{character}x{MARK}", "host")


TEMPLATES = st.sampled_from(
    [
        "postgresql://me:{}@127.0.0.1:1/db?retry_timeout=0",
        "postgresql://me:{}@/db?retry_timeout=0&host=127.0.0.1&port=1",
        "postgresql://me:{}@127.0.0.1:1/db?pool_size=none",
        "postgresql://me:{}@127.0.0.1:1/db?poolsize=1",
        "postgresql://me:{}@127.0.0.1:port/db",
        "postgresql://127.0.0.1:1/db?retry_timeout=0&user=me&password={}",
        "postgresql://me:{}",
        "sqlite://me:{}@host/x.db",
        "memory://me:{}@name",
        "nobody://me:{}@host",
    ]
)


@settings(deadline=None)
@given(template=TEMPLATES, password=PASSWORDS, encoded=st.booleans())
@example("postgresql://me:{}@127.0.0.1:1/db?retry_timeout=0", "p@a/b", False)
@example("postgresql://me:{}@127.0.0.1:1/db?retry_timeout=0", "12?user=b", False)
@example("postgresql://me:{}@127.0.0.1:1/db?retry_timeout=0", "a/b?cd&cd", False)
async def test_urls_no_password_is_shown(template: str, password: str, encoded: bool) -> None:
    # Without a host, the text after a raw @ is parsed as one.
    assume(encoded or "@" in template or "@" not in password)
    # The marks identify fragments on either side of every special character.
    secret = MARK + "".join(f"{one}{MARK}" if one in SPECIAL else one for one in password)
    url = template.format(quote(secret, safe="") if encoded else secret)
    shown = [redact(url)]
    try:
        shown += [repr(parse_url(url)), str(parse_url(url))]
    except ConfigurationError as error:
        shown.append(_all_texts_of(error))
    config = StoreConfig(url=url, scheme="x", options={"password": secret}, clock=None, migrate=True)
    shown.append(repr(config))
    with pytest.raises(FlowStoreError) as caught:
        async with open_store(url):
            pass
    shown.append(_all_texts_of(caught.value))
    assert MARK not in "".join(shown)


@given(password=PASSWORDS, encoded=st.booleans(), host=st.sampled_from(["host:5432", "[::1]:1", "a,b:2"]))
def test_urls_a_password_is_parsed_or_the_url_is_refused(password: str, encoded: bool, host: str) -> None:
    """No part of a password is parsed as a host, a path or an option."""
    url = f"mine://me:{quote(password, safe='') if encoded else password}@{host}/db?colour=red"
    refused = None
    try:
        parsed = parse_url(url)
    except ConfigurationError as error:
        refused = str(error)
    if refused is not None:
        assert not encoded
        assert set(password) & set("/?%")
        assert ENCODED in refused
        return
    assert (parsed.user, parsed.hosts, parsed.path, parsed.options) == ("me", host, "db", {"colour": "red"})
    assert password == parsed.password or not encoded
    assert parsed.password in parsed.secrets()


SECRETS = ["hunter2", "p@ss", "a:b", "a/b", "a?b", "a#b", "a&b=c", "p%40ss", "@@", "ünï", "a b", "[x]", "://"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("encoded", [True, False])
def test_urls_redact_never_shows_a_password(secret: str, encoded: bool) -> None:
    quoted = quote(secret, safe="") if encoded else secret
    shown = redact(f"postgresql://me:{quoted}S3cr3t@host:5432/db?sslmode=require&password={quoted}S3cr3t")
    assert "S3cr3t" not in shown
    assert quoted not in shown.replace("postgresql://", "").replace("@host", "")
    assert "require" not in shown
    if encoded:
        assert "host:5432/db" in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///flows.db", "sqlite:///flows.db"),
        ("memory://name", "memory://name"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:secret@[::1]:5432,b:1/db", "postgresql://me:***@[::1]:5432,b:1/db"),
        ("postgresql:///db?password=secret&user=me", "postgresql:///db?password=...&user=..."),
        ("postgresql://me:secret", "postgresql://me:***"),
        ("secret", "<not a URL>"),
    ],
)
def test_urls_redact_keeps_the_other_parts(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_urls_secrets_include_the_encoded_and_the_decoded_form() -> None:
    parsed: StoreUrl = parse_url("mine://me:p%40w@h?password=a%2Fb&sslpassword=c&colour=red")
    assert parsed.secrets() == {"p%40w", "p@w", "a%2Fb", "a/b", "c"}
    assert parse_url("mine://h").secrets() == set()
