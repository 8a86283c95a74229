"""Makes neural networks sparse while they train."""

from typing import TYPE_CHECKING, Any

from .drop_rate import DropRateScheduler
from .impact import Impact, TensorSummary
from .impact_adamw import ImpactAdamW
from .impact_sgd import ImpactSGD
from .signals import SIGNALS
from .sparsity import SparsityReport, erdos_renyi

if TYPE_CHECKING:
    from .pruning import ActivationPruner, load_pruned, save_pruned

__all__ = [
    "SIGNALS",
    "ActivationPruner",
    "DropRateScheduler",
    "Impact",
    "ImpactAdamW",
    "ImpactSGD",
    "SparsityReport",
    "TensorSummary",
    "erdos_renyi",
    "load_pruned",
    "save_pruned",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The pruner is imported when it is asked for: it needs torch.export, which takes half a second."""
    if name in ("ActivationPruner", "load_pruned", "save_pruned"):
        from . import pruning

        return getattr(pruning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
