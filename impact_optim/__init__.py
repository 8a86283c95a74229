"""Makes neural networks sparse while they train."""

from .impact_sgd import ImpactSGD, TensorSummary
from .pruning import ActivationPruner, load_pruned, save_pruned
from .signals import SIGNALS

__all__ = ["SIGNALS", "ActivationPruner", "ImpactSGD", "TensorSummary", "load_pruned", "save_pruned"]
__version__ = "0.1.0"
