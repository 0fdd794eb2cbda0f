"""The gated MLP: cuBLAS through torch."""

from backend.kernels.reference.gated_mlp import gated_mlp

__all__ = ["gated_mlp"]
