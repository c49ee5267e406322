"""Engines: how products are executed, one file each. An engine is closed: what it does not list it refuses."""
