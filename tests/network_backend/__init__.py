"""A backend over a network, as an outside author would write it: the document toolkit on a key-value server.

``python -m tests.network_backend`` starts the server and prints the URL of a store on it. The plugin also has
the backend with one bug each, which the suite must find with ``--faults``.
"""

from pathlib import Path

DIST = Path(__file__).parent / "dist"
"""Contains a dist-info folder, so that the plugin is found like an installed one."""
