"""Tests of the promises in docs/security.md."""
