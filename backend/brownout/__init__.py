"""Brownout: the settings a controller changes while the engine runs."""
