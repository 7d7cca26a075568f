"""A worked example of a flowstore backend: a folder with one JSON file per run."""
