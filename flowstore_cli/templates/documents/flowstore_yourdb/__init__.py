"""A flowstore backend on the document toolkit."""
