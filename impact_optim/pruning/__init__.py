"""Cuts units that carry little information out of a network while it trains, exactly, and keeps what is left."""

from .architecture import load_pruned, save_pruned
from .attention import open_heads
from .criteria import CRITERIA
from .graph import Axis, Observation, UnitGraph, UnitGroup
from .plan import Plan, PruneRecord
from .pruner import ActivationPruner, ramp
from .repair import repair
from .report import LayerReport, PruneReport
from .surgery import cut
from .tracing import trace

__all__ = [
    "CRITERIA",
    "ActivationPruner",
    "Axis",
    "LayerReport",
    "Observation",
    "Plan",
    "PruneRecord",
    "PruneReport",
    "UnitGraph",
    "UnitGroup",
    "cut",
    "load_pruned",
    "open_heads",
    "ramp",
    "repair",
    "save_pruned",
    "trace",
]
