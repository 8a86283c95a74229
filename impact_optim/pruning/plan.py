"""One cut as it travels: chosen on the graph, rehearsed, reported, carried out, repaired from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class PruneRecord(NamedTuple):
    """What is left of one dimension of a parameter or buffer after a cut."""

    name: str
    """Qualified name (the first one of tied parameters)."""
    dim: int
    kept: Tensor
    """int64, the indices that were kept, ascending."""
    before: int
    """How many there were."""


@dataclass(frozen=True)
class Plan:
    """What a cut takes, and what it leaves of everything that has it; see :meth:`UnitGraph.plan`."""

    left: dict[str, Tensor] = field(default_factory=dict)
    """Group that loses units -> positions of those that stay, ascending."""
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """First qualified name of a parameter or buffer -> dimension -> the indices that are kept."""
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """Module and integer attribute -> its new value."""
    removed: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.bool))
    """Whether the unit of a label goes; the last entry answers for the label -1."""
    made_for: dict[str, Tensor] = field(default_factory=dict)
    """Group -> the original positions of the units that it had when the plan was made."""
    records: list[PruneRecord] = field(default_factory=list)
    """``kept`` as a list, one for each dimension of a parameter or buffer that is cut."""


UNCUT = Plan()
"""Nothing goes."""
