"""flowstore_cli: the command ``flowstore``, for people and for scripts."""
