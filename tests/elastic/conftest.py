"""Property tests here have no deadline: how long an example takes says something about the machine's load only."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
