"""The conformance suite for flowstore backends."""
