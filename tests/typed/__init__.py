"""Programs that a strict type checker must accept, and the test that runs it on them."""
