"""Dense linear layers: cuBLAS through torch."""

from backend.kernels.reference.linear import linear

__all__ = ["linear"]
