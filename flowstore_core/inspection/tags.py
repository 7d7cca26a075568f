"""Tags as people write them: ``KEY=VALUE``."""

from __future__ import annotations


def add_tag(tags: dict[str, str], text: str) -> None:
    """Add a tag of the form KEY=VALUE to ``tags``; the key ends at the first ``=``.

    Raises ValueError if the text has another form, or the key is there with another value.
    """
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"a tag has the form KEY=VALUE, not {text!r}")
    if tags.setdefault(key, value) != value:
        raise ValueError(f"tag {key!r} is given twice, with two values")
