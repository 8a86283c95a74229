"""Statistics of the activations of units, streamed over the batches of a training run.

A unit answers an input with a *response*: its activation averaged over positions (pixels, tokens), which of a unit with
several channels (a head, a channel that has been flattened) is the root mean square over them, since within a head the
coordinates are arbitrary. Per unit a histogram of the responses, their sums under random signs and a few counts are
kept: nothing of the size of a parameter or of the data, and nothing that waits for the device.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from ..sampling import philox4x32
from .graph import Observation, UnitGraph, UnitGroup
from .plan import Plan

# The finest bin width. Responses below 2^-64 are those of a dead unit.
_FINEST = -64
_BINS = 256  # a power of two
_PROJECTIONS = 64  # at most 128; the standard error of a unit's complexity is 0.76 / sqrt(64) of it
_ROWS = 4096  # samples taken in at once, where tokens or points are samples
_WORD = 0xFFFFFFFF
_SIGNS = 0x5241444D  # the third word of the counter, apart from every step of a mask stream


# -- entropy --------------------------------------------------------------------------------------------------------


def entropy(counts: Tensor) -> Tensor:
    r"""The entropy of observed frequencies, :math:`H = -\sum_b p_b \log_2 p_b` with :math:`p = c / \sum c`, in bits.

    Args:
        counts: c ≥ 0, [..., bins]; 0 bits where all of them are 0.

    Returns:
        float64, [...], between 0 and log2(bins).

    Example:
        >>> entropy(torch.tensor([[1, 1, 1, 1], [4, 0, 0, 0]]))
        tensor([2., 0.], dtype=torch.float64)
    """
    c = counts.double()
    return torch.special.entr(c / c.sum(-1, keepdim=True).clamp_min(1.0)).sum(-1) / math.log(2.0)


def coarsened(counts: Tensor, shift: Tensor) -> Tensor:
    r"""A histogram on bins :math:`2^{shift}` times as wide: bin k becomes bin :math:`\lfloor k / 2^{shift} \rfloor`.

    Bins are numbered from the middle, where the edge 0 stays. Counting on the wide bins at once gives the same.

    Args:
        counts: [..., units, bins].
        shift: int64, [units], ≥ 0.
    """
    half = counts.shape[-1] // 2
    place = torch.arange(-half, half, device=counts.device)
    target = (place >> shift.clamp(max=62).unsqueeze(-1)) + half
    return torch.zeros_like(counts).scatter_add_(-1, target.expand_as(counts), counts)


# -- Rademacher complexity ------------------------------------------------------------------------------------------


# All layers see the same samples, so that one batch needs the signs of few counters.
@functools.lru_cache(maxsize=8)
def rademacher_signs(
    first: int, n: int, projections: int, seed: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """The signs σ of n consecutive samples under each projection, ±1, float64 [projections, n].

    A sign depends on (seed, rank, index of the sample, projection) alone, not on the device or the batches.

    Args:
        first: index of the first sample, in [0, 2^32).
        n: how many samples.
        projections: how many independent vectors of signs, at most 128.
        seed: in [0, 2^64).
        rank: number of the data-parallel process.
        device: of the result, which calls share: not to be written to.
    """
    sample = torch.arange(first, first + n)
    words = philox4x32((sample & _WORD, rank, _SIGNS, 0), (seed & _WORD, seed >> 32 & _WORD))
    bits = torch.stack(words).unsqueeze(1) >> torch.arange(32).view(1, 32, 1) & 1
    return (bits.flatten(0, 1)[:projections].double() * 2.0 - 1.0).to(device)


def rademacher_complexity(projections: Tensor, n: Tensor | int) -> Tensor:
    r"""The empirical Rademacher complexity of the linear functions of a vector of features.

    For :math:`F = \{x \mapsto \langle w, a(x) \rangle : \|w\|_2 \le 1\}` the supremum is a norm:

    .. math::
        R(F) = \tfrac{1}{n} \, E_\sigma \sup_{f \in F} \sum_i \sigma_i f(x_i)
             = \tfrac{1}{n} \, E_\sigma \Big\| \sum_i \sigma_i a(x_i) \Big\|_2
             \le \tfrac{1}{n} \sqrt{\textstyle\sum_i \|a(x_i)\|^2}.

    Khintchine's inequality bounds it from below by the same over √2: for one feature alone, R is its root mean square
    up to that factor.

    Args:
        projections: :math:`\sum_i \sigma_i a(x_i)` for each vector of signs, [..., signs, features].
        n: number of samples, broadcastable to [...].

    Returns:
        [...], the mean over the given vectors of signs.

    Source: Bartlett & Mendelson, Rademacher and Gaussian complexities, JMLR 2002; Haagerup, The best constants in the
    Khintchine inequality, 1981.
    """
    return projections.norm(dim=-1).mean(-1) / n


def complexity_lost(projections: Tensor, order: Tensor) -> Tensor:
    r"""The share of a layer's Rademacher complexity that goes with its first j features in an order.

    It is :math:`1 - R(F_j) / R(F_0)` with F_j the linear functions of the features that are left: 0 for
    j = 0, 1 for all, and never falling. A layer without complexity loses j over the number of features.

    Args:
        projections: as in :func:`rademacher_complexity`, [signs, features].
        order: int64, [features], the order of removal.

    Returns:
        float64, [features + 1].
    """
    left = projections[:, order].square().flip(-1).cumsum(-1).flip(-1)  # a row: the energy of what is not gone yet
    left = nn.functional.pad(left, (0, 1)).sqrt().mean(0)
    share = torch.arange(len(left), dtype=left.dtype, device=left.device) / max(len(order), 1)
    return torch.where(left[0] > 0, 1.0 - left / left[0], share)


# -- responses ------------------------------------------------------------------------------------------------------


def channel_responses(activation: Tensor, dim: int) -> Tensor:
    """Averages an activation over all dimensions but the samples' (the first) and the channels'.

    Args:
        activation: of any floating type.
        dim: the channels' dimension; not the first.

    Returns:
        [samples, channels], float32, or float64 of a float64 activation.

    Raises:
        TypeError, ValueError: the activation is not of that form.
    """
    if not activation.is_floating_point():
        raise TypeError(f"an activation of type {activation.dtype} has no responses; observe a floating point tensor")
    if dim == 0 or not -activation.ndim < dim < activation.ndim:
        raise ValueError(
            f"dimension {dim} of an activation of shape {tuple(activation.shape)} cannot be that of the channels: it "
            "holds the samples, or is not there"
        )
    dtype = torch.promote_types(activation.dtype, torch.float32)
    others = [d for d in range(1, activation.ndim) if d != dim % activation.ndim]
    return activation.mean(others, dtype=dtype) if others else activation.to(dtype)


def _channels_of(units: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The channels of each unit, int64 [size, most], filled up with -1, and how many each has, [size]."""
    order = units.argsort(stable=True)
    order = order[units[order] >= 0]
    of = units[order]
    number = torch.bincount(of, minlength=size)
    slot = torch.arange(len(of)) - (number.cumsum(0) - number)[of]
    table = torch.full((size, max(int(number.max()) if size else 0, 1)), -1)
    table[of, slot] = order
    return table, number


# -- accumulators ---------------------------------------------------------------------------------------------------


class UnitStatistics:
    r"""Accumulators of one set of units, observed in one place.

    - ``counts``: a histogram of responses per unit. Its bins are the middle ones of a fixed grid of width :math:`2^e`,
      e the least exponent with which they hold every response so far (``exponent``). Where e grows, pairs of bins are
      joined: the order of the samples and how they are divided do not show.
    - ``projections``: :math:`\sum_i \sigma_i a(x_i)` for fixed random signs, and ``signs``: :math:`\sum_i \sigma_i`.
    - ``total``: :math:`\sum_i a(x_i)`, and ``energy``: :math:`\sum_i a(x_i)^2`.
    - ``seen`` responses entered; what is not finite is left out of everything.

    ``samples`` is the index of the next sample in the stream of signs. The accumulators follow the activations to
    their device.

    Args:
        size: number of units.
        seed: of the signs.
        rank: number of the data-parallel process; each has its own signs.
    """

    _FIELDS: ClassVar = (
        "counts",  # int32 [units, bins]
        "exponent",  # int64 [units]
        "projections",  # float64 [projections, units]
        "signs",  # int32 [projections, units]
        *("total", "energy"),  # float64 [units]
        "seen",  # int64 [units]
    )

    def __init__(self, size: int, *, seed: int = 0, rank: int = 0) -> None:
        self.seed, self.rank, self.samples = seed, rank, 0
        self.counts = torch.zeros(size, _BINS, dtype=torch.int32)
        self.exponent = torch.full((size,), _FINEST)
        self.projections = torch.zeros(_PROJECTIONS, size, dtype=torch.float64)
        self.signs = torch.zeros(_PROJECTIONS, size, dtype=torch.int32)
        self.total, self.energy = torch.zeros(2, size, dtype=torch.float64)
        self.seen = torch.zeros(size, dtype=torch.int64)

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.exponent)

    @torch.no_grad()
    def update(self, channels: Tensor, units: Tensor) -> None:
        """Takes in the responses to a batch, which several groups may share.

        Args:
            channels: from :func:`channel_responses`, [samples, channels].
            units: int64 on the CPU, [channels]: the unit that each channel belongs to, -1 for none.

        Raises:
            ValueError: they are not of one layer; nothing has been taken in.
        """
        if len(units) != channels.shape[1]:
            raise ValueError(f"units are given for {len(units)} channels, the activation has {channels.shape[1]}")
        with torch.autocast(channels.device.type, enabled=False):
            for part in channels.split(_ROWS) if len(channels) else ():
                self._add(part, units)

    def _add(self, channels: Tensor, units: Tensor) -> None:
        response, valid = self._of_units(channels, units)
        signs = rademacher_signs(
            self.samples, len(response), len(self.projections), self.seed, self.rank, response.device
        )
        self.samples += len(response)
        self._count(response, valid)
        self.projections.addmm_(signs, response)
        self.signs += (signs @ valid.double()).int()
        self.total += response.sum(0)
        self.energy += response.square().sum(0)
        self.seen += valid.sum(0)

    def _of_units(self, channels: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Responses, float64 [samples, units] with zeros for those left out, and which enter."""
        response = channels.cpu() if channels.device.type == "mps" else channels  # has no float64
        device = response.device
        self.to(device)
        has_channels: Tensor | bool = True
        if not units.equal(torch.arange(self.size)):
            table, number = (t.to(device, non_blocking=True) for t in _channels_of(units, self.size))
            response = nn.functional.pad(response, (0, 1))[:, table]  # -1 picks the column of zeros at the end
            if table.shape[1] > 1:
                response = (response.double().square().sum(-1) / number.clamp_min(1)).sqrt()
            else:
                response = response.squeeze(-1)
            has_channels = number > 0
        valid = response.isfinite() & has_channels
        return torch.where(valid, response.double(), 0.0), valid

    def _count(self, response: Tensor, valid: Tensor) -> None:
        size, bins = self.counts.shape
        largest = response.abs().amax(0)
        # |a| < 2^x is the reach of half of the bins, which are 2^(x - e) in number.
        e = torch.frexp(largest).exponent.long() - (bins // 2).bit_length() + 1
        self._coarsen(torch.where(largest > 0, e, _FINEST))
        place = response.mul(torch.exp2(-self.exponent.double())).floor_().clamp_(-(bins // 2), bins // 2 - 1).long()
        cell = place + bins // 2 + torch.arange(0, size * bins, bins, device=place.device)
        self.counts.view(-1).scatter_add_(0, cell.flatten(), valid.to(torch.int32).flatten())

    def _coarsen(self, exponent: Tensor) -> None:
        """Widens the bins of the units whose exponent is below the given one."""
        new = torch.maximum(self.exponent, exponent)
        # Off a CPU the question would wait for the device, and the answer costs little.
        if new.device.type != "cpu" or not new.equal(self.exponent):
            self.counts.copy_(coarsened(self.counts, new - self.exponent))
            self.exponent.copy_(new)

    # What the accumulators say, float64 [units].

    def entropy(self) -> Tensor:
        r"""Entropy in bits of the response over inputs, on bins as wide as the unit with the widest range needs.

        On bins of its own a unit that hardly moves would fill as many as any other.

        Source: Luo & Wu, An entropy-based pruning method for CNN compression, 2017.
        """
        return entropy(coarsened(self.counts, self.exponent.amax() - self.exponent))

    def mean(self) -> Tensor:
        """Mean response."""
        return self.total / self.seen.clamp_min(1)

    def std(self) -> Tensor:
        """Standard deviation of the response, without Bessel's correction."""
        return (self.energy / self.seen.clamp_min(1) - self.mean().square()).clamp_min(0.0).sqrt()

    def centred_projections(self) -> Tensor:
        r""":math:`\sum_i \sigma_i (a(x_i) - \bar a)`, [projections, units].

        A constant is not a function of the input; the biases or norms of those that read a unit can take it over.
        """
        return self.projections - self.signs * self.mean()

    def rademacher(self) -> Tensor:
        r"""Rademacher complexity of what a unit does beyond a constant.

        It is :math:`\tfrac{1}{n} E_\sigma |\sum_i \sigma_i (a(x_i) - \bar a)|`; see :func:`rademacher_complexity`. By
        Khintchine's inequality it is between :math:`1 / \sqrt{2n}` and :math:`1 / \sqrt n` times :meth:`std`, up to the
        error of finitely many vectors of signs.
        """
        return rademacher_complexity(self.centred_projections().t().unsqueeze(-1), self.seen.clamp_min(1))

    # What happens to them.

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._FIELDS}

    @torch.no_grad()
    def all_reduce(self) -> UnitStatistics:
        """A copy with the statistics of all processes together; every process has to call it."""
        result = copy.deepcopy(self)
        if dist.is_available() and dist.is_initialized():
            largest = self.exponent.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            result._coarsen(largest)
            for name, tensor in result._tensors().items():
                if name != "exponent":
                    dist.all_reduce(tensor)
        return result

    def keep(self, kept: Tensor) -> None:
        """After a cut: keeps the statistics of these units, int64 positions in their new order."""
        for name, own in self._tensors().items():
            dim = 1 if name in ("projections", "signs") else 0
            setattr(self, name, own.index_select(dim, kept.to(own.device)))

    def reset(self) -> None:
        """Forgets everything but the place in the stream of signs."""
        for name, own in self._tensors().items():
            own.fill_(_FINEST if name == "exponent" else 0)

    def to(self, device: torch.device | str) -> UnitStatistics:
        """Moves the accumulators to a device, and returns these statistics."""
        for name, own in self._tensors().items():
            setattr(self, name, own.to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, as references."""
        return {"samples": self.samples, "seed": self.seed, **self._tensors()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what :meth:`state_dict` gave, or raises a ValueError, if it is that of other units.

        The rank and the device stay.
        """
        for name, own in self._tensors().items():
            if name not in state or (state[name].shape, state[name].dtype) != (own.shape, own.dtype):
                raise ValueError(f"{name} of the statistics is missing, or that of other units")
        for name, own in self._tensors().items():
            own.copy_(state[name])
        self.samples, self.seed = int(state["samples"]), int(state["seed"])


# -- hooks ----------------------------------------------------------------------------------------------------------


def observed(group: UnitGroup) -> list[Observation]:
    """Where a group is looked at: where its units are read, or else written, in at most four places.

    The channels of a residual stream are read in dozens of places; first, last and two between tell enough of them.
    """
    places = [o for o in group.observations if o.where == "input"] or group.observations
    number = min(len(places), 4)
    return [places[i * (len(places) - 1) // max(number - 1, 1)] for i in range(number)]


class ActivationStatistics:
    """The statistics of all groups of a model, gathered by forward hooks while it trains.

    They see the forward passes in training mode and with gradients, one in ``every``: with 8, a ResNet-18 trains about
    1% slower. Memory is 1.8 KiB per unit and place. Attach the hooks before ``torch.compile``, which does not look for
    new ones afterwards; each breaks the compiled graph. A copy of the model has none. After a cut call :meth:`keep`.

    Args:
        model: whose modules the graph names; not a wrapper around it.
        graph: its groups.
        every: record one training pass in so many.
        seed: of the random signs, which each data-parallel process has its own of.
    """

    def __init__(self, model: nn.Module, graph: UnitGraph, *, every: int = 8, seed: int = 0) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.model, self.graph, self.every = model, graph, every
        self.batches = 0
        device = next((p.device for p in model.parameters() if p.device.type != "mps"), torch.device("cpu"))
        self.groups: dict[str, list[UnitStatistics]] = {
            name: [UnitStatistics(group.size, seed=seed, rank=rank).to(device) for _ in observed(group)]
            for name, group in graph.groups.items()
        }
        self._handles: list[RemovableHandle] = []
        self._recording = False

    def attach(self) -> None:
        """Begins to gather."""
        if self._handles:
            return
        sites: dict[tuple[str, str, int], list[tuple[str, int]]] = {}
        for name, group in self.graph.groups.items():
            for i, place in enumerate(observed(group)):
                sites.setdefault((place.module, place.where, place.dim), []).append((name, i))
        modules = dict(self.model.named_modules(remove_duplicate=False))
        begin, end = (_Hook(self, action) for action in (ActivationStatistics._begin, ActivationStatistics._end))
        self._handles.append(self.model.register_forward_pre_hook(begin))
        self._handles.append(self.model.register_forward_hook(end, always_call=True))
        for site, places in sites.items():
            (module, where, _) = site
            hook = _Hook(self, functools.partial(ActivationStatistics._observe, site=site, places=places))
            if where == "input":
                self._handles.append(modules[module].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(modules[module].register_forward_hook(hook))

    def detach(self) -> None:
        """Ends it; what has been gathered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._recording = False

    def _begin(self, model: nn.Module, args: Any) -> None:
        if _trains(model):
            self._recording = self.batches % self.every == 0
            self.batches += 1

    # What comes after the pass is none of a batch: a recomputation in the backward pass, a part called by itself.
    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if _trains(model):
            self._recording = False

    def _observe(
        self, module: nn.Module, *args: Any, site: tuple[str, str, int], places: list[tuple[str, int]]
    ) -> None:
        if not self._recording:
            return
        name, where, dim = site
        # A hook of the input gets arguments by position and by name, one of the output gets that last.
        activation = args[-1] if where == "output" else (*args[0], *args[1].values())[0]
        if isinstance(activation, FakeTensor):
            return
        if not isinstance(activation, Tensor):
            raise TypeError(f"the {where} of {name!r} is a {type(activation).__name__}, not a tensor")
        try:
            with torch.no_grad():
                responses = channel_responses(activation, dim)
                for group, i in places:
                    units = observed(self.graph.groups[group])[i].units
                    self.groups[group][i].update(responses, units)
        except (TypeError, ValueError) as error:
            raise type(error)(f"no statistics of the {where} of {name!r}: {error}") from error

    def all_reduce(self) -> dict[str, list[UnitStatistics]]:
        """``groups``, each as by :meth:`UnitStatistics.all_reduce`."""
        return {name: [place.all_reduce() for place in places] for name, places in self.groups.items()}

    def keep(self, plan: Plan) -> None:
        """After a cut: keeps the statistics of the units that are left."""
        for name, positions in plan.left.items():
            for place in self.groups[name]:
                place.keep(positions)

    def reset(self) -> None:
        """Begins anew; the next training pass is recorded."""
        self.batches = 0
        for places in self.groups.values():
            for place in places:
                place.reset()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, as references. Each data-parallel process has its own."""
        groups = {name: [place.state_dict() for place in places] for name, places in self.groups.items()}
        return {"batches": self.batches, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what :meth:`state_dict` gave, or raises a ValueError, if it is that of other groups."""
        own, other = ({name: len(places) for name, places in g.items()} for g in (self.groups, state["groups"]))
        if other != own:
            differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
            raise ValueError(f"the statistics are of other groups or places; they differ in {differing[:5]}")
        for name, places in self.groups.items():
            for place, its in zip(places, state["groups"][name], strict=True):
                place.load_state_dict(its)
        self.batches = int(state["batches"])


class _Hook:
    """A forward hook that a copy or a pickle of the module leaves behind, and that compiled graphs break at."""

    def __init__(self, statistics: ActivationStatistics, action: Callable[..., None]) -> None:
        self.statistics = weakref.ref(statistics)
        self.action = action

    def __call__(self, module: nn.Module, *args: Any) -> None:
        # Not is_exporting(), which torch.compile of torch 2.8 takes for True.
        if not torch.compiler._is_exporting_flag:
            self._run(module, *args)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _run(self, module: nn.Module, *args: Any) -> None:
        statistics = self.statistics()
        if statistics is not None:
            self.action(statistics, module, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_do_nothing,)


def _do_nothing(*args: Any) -> None:
    """What a copied hook does."""


# Batch norm is renewed in training mode, but without gradients: those batches have been seen already.
def _trains(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()
