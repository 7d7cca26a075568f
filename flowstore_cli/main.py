"""The entry point of the command ``flowstore``: its streams, and the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flowstore_cli.streams import guarded_streams

NEEDED = frozenset({"click", "rich", "typer"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit code."""
    with guarded_streams() as output:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        # A reader that closes the pipe is no error.
        if output is None or output.error is None or isinstance(output.error, ConnectionError):
            return code
        from flowstore_cli.failures import UNWRITTEN

        sys.stderr.write(f"flowstore: standard output cannot be written: {output.error.strerror}\n")
        return code or UNWRITTEN


def _run(arguments: Sequence[str]) -> int:
    try:
        from flowstore_cli.app import run

        return run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("flowstore: interrupted\n")
        return 130
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in NEEDED:
            raise
        sys.stderr.write(f"flowstore: module {module!r} is missing; pip install 'flowstore[cli]'\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
