"""Makes neural networks sparse while they train."""

from .drop_rate import DropRateScheduler
from .impact import Impact, TensorSummary
from .impact_adamw import ImpactAdamW
from .impact_sgd import ImpactSGD
from .pruning import ActivationPruner, load_pruned, save_pruned
from .signals import SIGNALS
from .sparsity import SparsityReport

__all__ = [
    "SIGNALS",
    "ActivationPruner",
    "DropRateScheduler",
    "Impact",
    "ImpactAdamW",
    "ImpactSGD",
    "SparsityReport",
    "TensorSummary",
    "load_pruned",
    "save_pruned",
]
__version__ = "0.1.0"
