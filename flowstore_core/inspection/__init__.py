"""Reads that the command line and the dashboard share: from any store, through the protocols alone."""
