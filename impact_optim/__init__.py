"""Makes neural networks sparse while they train."""

from .impact_sgd import ImpactSGD, TensorSummary
from .signals import SIGNALS

__all__ = ["SIGNALS", "ImpactSGD", "TensorSummary"]
__version__ = "0.1.0"
