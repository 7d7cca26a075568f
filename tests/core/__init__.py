"""Core: configuration, plugins, validation, batching, errors, ids."""
