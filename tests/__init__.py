"""The tests: ``contract`` is every clause on every backend, ``core`` is what lies above the backends."""
