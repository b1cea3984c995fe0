"""Where parts become processes: command line, settings, local stack."""
