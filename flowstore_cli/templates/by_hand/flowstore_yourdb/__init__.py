"""A flowstore backend written by hand."""
