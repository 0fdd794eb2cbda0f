"""Loads, measurements and the demo, all through the real server's public interfaces."""
