"""Control laws: pure objects, from a reading and the time since the last one to thresholds."""

from controller.laws.base import Decision, Law, Limits
from controller.laws.off import Off
from controller.laws.predictive import Predictive
from controller.laws.salc import Salc

LAWS: dict[str, type[Law]] = {"salc": Salc, "predictive": Predictive, "off": Off}

__all__ = ["LAWS", "Decision", "Law", "Limits", "Off", "Predictive", "Salc"]
