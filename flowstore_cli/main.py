"""The entry point of the command ``flowstore``; says what to install where the extra ``cli`` is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDED = frozenset({"click", "rich", "typer"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit code."""
    try:
        from flowstore_cli.app import run
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in NEEDED:
            raise
        sys.stderr.write(f"flowstore: module {module!r} is missing; pip install 'flowstore[cli]'\n")
        return 2
    return run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
