"""What lies above the backends: configuration, plugins, input checks, errors, ids."""
