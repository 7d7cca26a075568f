"""A worked example of a flowstore backend: one JSON file per run, in a folder."""
