"""How the arms of a study become sparse for good, when the main job asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..drop_rate import DropRateScheduler
from ..pruning import ramp
from ..sparsity import erdos_renyi
from .arms import GRADUAL, Masked

FLOOR = 0.1  # what a layer keeps at least, of the share that all keep: an empty one is refused, and ends the run
RAMP = 0.75  # of the epochs, as in Zhu & Gupta: then the network is sparse, and what is left trains on


class CannotBeSparse(ValueError):
    """A run whose weights cannot be made as sparse as was asked: nothing would be left of a layer."""


def ramp_epochs(epochs: int) -> int:
    """After how many epochs a network is sparse."""
    return max(1, min(round(RAMP * epochs), epochs - 1))


class SparseFinish:
    """Makes a network sparse in one training run, the way of its arm.

    - Arms that drop by importance ramp their drop rate up to the sparsity, and keep the most important weights then.
      Parameter groups share the sparsity as :func:`~impact_optim.erdos_renyi` has it: importances are of one group, and
      say nothing about another. A ``keep_floor`` is lowered to a tenth of that at most.
    - ``gradual-magnitude`` removes the smallest weights before every epoch of the same ramp (Zhu & Gupta, 2017).
    - Arms without importances are cut to their largest weights after the last epoch.

    Where layers compete, each keeps a tenth of the common share at least.

    Args:
        optimizer: of the run.
        arm: its name.
        sparsity: the share of weights that are zero in the end.
        epochs: of the run, at least 2.
    """

    def __init__(self, optimizer: Masked, arm: str, sparsity: float, epochs: int) -> None:
        self._optimizer, self._sparsity, self._epochs = optimizer, sparsity, epochs
        self._ramp = ramp_epochs(epochs)
        options = optimizer.defaults
        self._shares = ramp(sparsity, start=0, end=self._ramp) if arm == GRADUAL else {}
        self._scheduler = None
        if options["importance"] != "uniform" and options["drop_rate"] > 0:
            targets = [1 - density for _, density in self._group_densities()]
            for group, target in zip(optimizer.param_groups, targets, strict=True):
                # Where little is left, chance must not take most of it.
                group["keep_floor"] = min(group["keep_floor"], 0.1 * (1 - target))
            self._scheduler = DropRateScheduler(optimizer, targets, self._ramp, start=0.0, shape="cubic")

    def before(self, epoch: int) -> None:
        """What comes before an epoch, counted from 0.

        Raises:
            CannotBeSparse: nothing would be left of a layer.
        """
        if self._scheduler is not None and epoch == self._ramp:
            exact, rounded = 0.0, 0
            for weights, density in self._group_densities():
                numel = sum(p.numel() for p in weights)
                exact += density * numel
                count, rounded = round(exact) - rounded, round(exact)  # so that what is rounded does not add up
                if weights:
                    self._sparsify(1 - count / numel, by="importance", params=weights)
        if epoch in self._shares:
            # A cut of units may have left a larger share of zeros, which do not come back.
            self._sparsify(max(self._shares[epoch], self._pruned_share()), by="magnitude")

    def after(self, epoch: int) -> None:
        """What comes after it."""
        if self._scheduler is not None and epoch + 1 < self._ramp:
            self._scheduler.step()

    def is_due(self, epoch: int) -> bool:
        """Whether the network is cut at the end of this epoch, and has to be measured before as well."""
        return self._scheduler is None and not self._shares and epoch == self._epochs - 1

    def cut(self) -> None:
        """Keeps the largest weights.

        Raises:
            CannotBeSparse: nothing would be left of a layer.
        """
        self._sparsify(self._sparsity, by="magnitude")

    def _group_densities(self) -> list[tuple[list[Tensor], float]]:
        """The weights of each parameter group, and which share of them is to be left."""
        self._optimizer._refresh()
        simplexes = list(self._optimizer._all())
        weights = [p for simplex in simplexes for p in simplex.members]
        living = [p.numel() - int(simplex.held(p).sum()) for simplex in simplexes for p in simplex.members]
        densities = erdos_renyi([p.shape for p in weights], 1 - self._sparsity, living)
        kept = {p: density * p.numel() for p, density in zip(weights, densities, strict=True)}
        found = []
        for members in (simplex.members for simplex in simplexes):
            numel = sum(p.numel() for p in members)
            found.append((members, sum(kept[p] for p in members) / numel if members else 1.0))
        return found

    def _pruned_share(self) -> float:
        groups = [group for group in self._optimizer.param_groups if group["hold_zeros"]]
        pruned = sum(int((p == 0).sum()) for group in groups for p in group["params"] if p.dim() >= 2)
        return pruned / sum(row.numel for row in self._optimizer.importance_summary())

    def _sparsify(self, sparsity: float, by: str, params: list[Tensor] | None = None) -> None:
        try:
            self._optimizer.sparsify(sparsity, by=by, params=params, floor=FLOOR)
        except ValueError as error:
            raise CannotBeSparse(f"the weights cannot be made this sparse: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state_dict)


class LayerDensity(NamedTuple):
    """How many weights of a tensor are not zero."""

    name: str
    numel: int
    kept: int


def layer_densities(model: nn.Module) -> list[LayerDensity]:
    """What is left of each tensor of two or more dimensions."""
    weights = ((name, p.detach()) for name, p in model.named_parameters() if p.dim() >= 2)
    return [LayerDensity(name, p.numel(), int(p.count_nonzero())) for name, p in weights]


def density(model: nn.Module) -> float:
    """The share of weights, of tensors of two or more dimensions, that are not zero."""
    layers = layer_densities(model)
    return sum(layer.kept for layer in layers) / sum(layer.numel for layer in layers)


def mean_densities(runs: Iterable[Sequence[LayerDensity]]) -> dict[str, float]:
    """The share of weights that each layer has kept, mean over runs of one model."""
    by_layer = zip(*runs, strict=True)
    return {
        layers[0].name.removesuffix(".weight"): fmean(layer.kept / layer.numel for layer in layers)
        for layers in by_layer
    }
