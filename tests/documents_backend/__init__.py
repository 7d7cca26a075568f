"""The document toolkit on a space in memory, as a backend with the scheme ``documents``."""

from pathlib import Path

DIST = Path(__file__).parent / "dist"
"""Contains a dist-info folder, so that the plugin is found like an installed one."""
