"""The checks, one module per noun, and the modules that look at many nouns at once."""
