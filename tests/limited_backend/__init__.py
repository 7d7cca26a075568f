"""A backend with the smallest limits that the contract allows, with the scheme ``limited``."""

from pathlib import Path

DIST = Path(__file__).parent / "dist"
"""Contains a dist-info folder, so that the plugin is found like an installed one."""
