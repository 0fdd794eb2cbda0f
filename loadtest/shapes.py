"""Locust load shapes over open-loop schedules: what is sent, and how long the test lasts.

A locustfile that imports one of the patterns and sets its parameters has a load of its own:

    from loadtest.shapes import StepShape
    from loadtest.users import HttpStreamUser

    class Evening(StepShape):
        base, burst, duration = 3, 8, 300
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from locust import LoadTestShape

from loadtest import arrivals as patterns


class OpenLoopShape(LoadTestShape):
    """The load of the option --arrivals; the test ends when its last request has ended."""

    #: A specification as for --arrivals, in its place.
    arrivals: str | None = None

    def tick(self) -> tuple[int, float] | None:
        """One user a worker process, which keeps it alive, until the dispatcher is done."""
        if self.runner.environment.open_loop.finished:
            return None
        count = max(1, self.runner.worker_count)
        return count, count


class PatternShape(OpenLoopShape):
    """A pattern whose parameters are class attributes."""

    abstract = True
    pattern: ClassVar[type[patterns.Pattern]]

    @property
    def arrivals(self) -> str:
        names = [f.name for f in dataclasses.fields(self.pattern)]
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return f"{self.pattern.name}:{','.join(f'{name}={value}' for name, value in given.items())}"


class PoissonShape(PatternShape):
    abstract = True
    pattern = patterns.Poisson


class GammaShape(PatternShape):
    abstract = True
    pattern = patterns.Gamma


class StepShape(PatternShape):
    abstract = True
    pattern = patterns.Step


class SpikeShape(PatternShape):
    abstract = True
    pattern = patterns.Spike


class DiurnalShape(PatternShape):
    abstract = True
    pattern = patterns.Diurnal
