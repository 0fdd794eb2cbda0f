"""Models: the families that can be served, their layers, and loading them from checkpoints."""

from backend.models.model import MoeModel
from backend.models.registry import load_model

__all__ = ["MoeModel", "load_model"]
