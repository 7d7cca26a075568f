"""``flowstore new-backend``: the package of a new backend, from the files in ``templates``."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from flowstore_cli.failures import USAGE, Failure
from flowstore_cli.printing import say
from flowstore_core.plugins import load_plugins

PLACEHOLDER = "yourdb"
"""The name of the backend in the templates."""


def new_backend(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The URL scheme: 1 to 30 lower-case letters and digits, first a letter.",
            show_default=False,
        ),
    ],
    documents: Annotated[
        bool, typer.Option("--documents", help="Write it on the document toolkit, for a key-value store.")
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write it (default: flowstore-NAME).", show_default=False),
    ] = None,
) -> None:
    """Write the package of a new backend: a plugin, a store, tests and a CI job.

    Its tests pass at once. Without --documents it is the beginning of a store by hand, and the report of
    the suite lists what is missing; with it, a complete store on a key-value space of five methods, which
    keeps its data in the process until you replace them.

    \b
      flowstore new-backend mine
      flowstore new-backend mine --documents --directory packages/mine
    """
    check_name(name)
    target = directory or Path(f"flowstore-{name}")
    try:
        target.mkdir()
    except FileExistsError:
        raise Failure(f"{target} exists; choose another --directory", USAGE) from None
    except OSError as error:
        raise Failure(f"{target} cannot be created: {error.strerror}", USAGE) from error
    templates = files("flowstore_cli") / "templates"
    try:
        for kind in ("common", "documents" if documents else "by_hand"):
            write(templates / kind, target, name)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise Failure(f"{error.filename or target} cannot be written: {error.strerror}") from error
    say(f"{target} has the backend {name}. Install it, run its tests, and check it:\n")
    python = program("python", sys.executable)
    has_pip = importlib.util.find_spec("pip") is not None
    install = f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"
    say(f"  cd {shlex.quote(str(target))} && {install} -e '.[test]'")
    say(f"  {python} -m pytest")
    say(f"  {program('flowstore', f'{python} -m flowstore_cli.main')} conformance {name}:// --profile quick")


def check_name(name: str) -> None:
    """Raise Failure unless the name is free and can be a URL scheme, a module and a distribution."""
    if not re.fullmatch(r"[a-z][a-z0-9]{0,29}", name):
        raise Failure("NAME must have 1 to 30 lower-case letters and digits, first a letter", USAGE)
    for plugin in load_plugins():
        if plugin.name == name or any(name in backend.schemes for backend in plugin.backends):
            owner = plugin.distribution or plugin.module
            raise Failure(f"the scheme {name!r} is that of a backend of {owner}; choose another NAME", USAGE)
    if importlib.util.find_spec(f"flowstore_{name}") is not None:
        raise Failure(f"the package flowstore_{name} is already installed; choose another NAME", USAGE)


def write(template: Traversable, target: Path, name: str) -> None:
    """Copy a directory of templates, with ``name`` for the placeholder in names and in texts."""
    for one in template.iterdir():
        path = target / one.name.replace(PLACEHOLDER, name)
        if one.is_dir():
            if one.name != "__pycache__":
                path.mkdir(exist_ok=True)
                write(one, path, name)
        else:
            text = one.read_text(encoding="utf-8").replace(PLACEHOLDER, name)
            path.write_text(text.replace(PLACEHOLDER.capitalize(), name.capitalize()), encoding="utf-8")


def program(name: str, fallback: str) -> str:
    """How to call a program of this environment: by its name, if that finds it."""
    found, own = shutil.which(name), Path(sys.executable).parent / name
    if found is not None and Path(found).absolute() == own.absolute():
        return name
    return shlex.quote(str(own)) if own.exists() else fallback
