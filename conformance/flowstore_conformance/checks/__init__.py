"""The checks: one module per noun, and modules that test several nouns together."""
