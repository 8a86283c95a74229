"""Groups of coupled units of a network, and exact surgery that removes some of them while it trains."""

from .graph import Axis, Observation, UnitGraph, UnitGroup, trace
from .surgery import PruneRecord, cut

__all__ = ["Axis", "Observation", "PruneRecord", "UnitGraph", "UnitGroup", "cut", "trace"]
