"""Runs a model as a cut would leave it, on tensors without data, before anything is touched."""

from __future__ import annotations

import copy
import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .plan import UNCUT, Plan
from .stand_ins import without_data

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward pass."""


@torch.library.custom_op(
    "impact_optim::opaque",
    mutates_args=(),
    schema="(Tensor[] inputs, int[] shape, ScalarType dtype, Device device, int macs) -> Tensor",
)
def _opaque(inputs: list[Tensor], shape: list[int], dtype: torch.dtype, device: torch.device, macs: int) -> Tensor:
    """What a module that is not run makes of its inputs."""
    return torch.empty(shape, dtype=dtype, device=device)


_opaque.register_fake(lambda inputs, shape, dtype, device, macs: torch.empty(shape, dtype=dtype, device=device))


@register_flop_formula(torch.ops.impact_optim.opaque)
def _opaque_flops(inputs: Any, shape: Any, dtype: Any, device: Any, macs: int, **others: Any) -> int:
    return 2 * macs


def as_inputs(example_inputs: Any) -> Inputs:
    """What a user hands in: a tuple of arguments, a mapping of keyword arguments, or one tensor."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {}


class Rehearsal:
    """How a model is run to see what a cut does: on which inputs, in which modes, and what it leaves out.

    Args:
        args, kwargs: of a forward pass.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        self.inputs: Inputs = (args, dict(kwargs or {}))
        self.modes: tuple[bool, ...] = (False,)
        """Whether a cut is rehearsed in evaluation (False), in training (True), or in both."""
        self._left_out: dict[str, list[tuple[Any, list[torch.device], int]]] = {}
        """Module that is not run -> for each of its calls: its output without data, devices, and MACs."""

    def leave_out(self, model: nn.Module, parts: Iterable[nn.Module]) -> None:
        """From now on some modules are not run: what they return, and the work of it, is noted once, with data."""
        names = {module: name for name, module in model.named_modules()}
        noted: dict[str, list[tuple[Any, list[torch.device]]]] = {names[part]: [] for part in parts}

        def note(part: nn.Module, _: Any, output: Any) -> None:
            devices = [leaf.device for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            noted[names[part]].append((tree_map_only(Tensor, lambda tensor: tensor.to("meta"), output), devices))

        handles = [part.register_forward_hook(note) for part in parts]
        try:
            with _mode(model, training=False), torch.no_grad(), counted_macs(model) as macs:
                model(*self.inputs[0], **self.inputs[1])
        finally:
            for handle in handles:
                handle.remove()
        self._left_out = {
            name: [(*call, macs.get(name, 0) // len(calls)) for call in calls] for name, calls in noted.items() if calls
        }

    def run(self, model: nn.Module, plan: Plan = UNCUT, training: bool = False) -> Any:
        """The output of a forward pass of the model as a plan would leave it; raises what the model's code raises."""
        with self._prepared(model, plan, training) as (args, kwargs):
            return model(*args, **kwargs)

    def export(self, model: nn.Module, plan: Plan = UNCUT, training: bool = False) -> ExportedProgram:
        """The program of ATen operators that the model runs as a plan would leave it.

        Raises:
            RuntimeError: ``torch.export`` cannot trace it; the message says where, and what to do.
        """
        try:
            with warnings.catch_warnings(), self._prepared(model, plan, training) as (args, kwargs):
                # That code keeps tensors is said in vain: what it has kept is thrown away.
                warnings.filterwarnings("ignore", "The tensor attribute")
                buffers = dict(model.named_buffers())
                program = torch.export.export(model, args, copy.copy(kwargs), strict=False)
                made = sorted(dict(model.named_buffers()).keys() - buffers.keys())
        except Exception as error:
            if kind := self._unknown_output(model, plan, training):
                raise RuntimeError(
                    f"torch.export cannot trace the model: its output contains a {kind}, which it does not know. Let "
                    "the model return tensors, tuples, lists or dicts (for language models of Hugging Face: "
                    f"use_cache=False), or register {kind} with torch.utils._pytree.register_pytree_node."
                ) from error
            module, line = culprit(model, error)
            where = f"in {module or 'the model itself'} ({line})" if line else "somewhere in it"
            raise RuntimeError(
                f"torch.export cannot trace the model: it stopped {where} with {type(error).__name__}: {error}. "
                "Change that line, or leave the module out with ignore=."
            ) from error
        if made:  # the program that torch.export gives is a wrong one
            raise RuntimeError(
                f"torch.export cannot trace the model as it is: its first forward pass makes the buffers {made}. "
                "Run it once before, on data"
            )
        return program

    def failure(self, model: nn.Module, plan: Plan) -> Exception | None:
        """What the model's code raises as a plan would leave it, in any of the modes."""
        for training in self.modes:
            try:
                self.run(model, plan, training)
            except Exception as error:
                return error
        return None

    def macs(self, model: nn.Module, plan: Plan = UNCUT) -> dict[str, int]:
        """Multiply-accumulates of one evaluation as a plan would leave the model, by module; of all of it: ``""``."""
        with counted_macs(model) as macs:
            self.run(model, plan)
        return macs

    @contextmanager
    def _prepared(self, model: nn.Module, plan: Plan, training: bool) -> Iterator[Inputs]:
        with _mode(model, training), without_data(model, plan) as fake, torch.no_grad():
            modules = dict(model.named_modules())
            for name, calls in self._left_out.items():
                modules[name].forward = _returning(calls)
            yield tree_map_only(Tensor, fake.from_tensor, self.inputs)

    def _unknown_output(self, model: nn.Module, plan: Plan, training: bool) -> str:
        """The type of something in a model's output that is neither a tensor nor a number, if the model runs so far."""
        try:
            leaves = tree_leaves(self.run(model, plan, training))
        except Exception:
            return ""
        plain = (Tensor, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
        return next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, plain)), "")


def _returning(calls: list[tuple[Any, list[torch.device], int]]) -> Callable[..., Any]:
    """A forward pass that gives the outputs of some calls, one after the other."""
    turns = itertools.cycle(calls)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        output, devices, macs = next(turns)
        # The work is that of the first tensor.
        places, work = iter(devices), itertools.chain([macs], itertools.repeat(0))
        return tree_map_only(Tensor, lambda t: _opaque(given, list(t.shape), t.dtype, next(places), next(work)), output)

    return forward


@contextmanager
def counted_macs(model: nn.Module) -> Iterator[dict[str, int]]:
    """Yields a dict that has, at the end, the multiply-accumulates of what a model has run, by module."""
    macs: dict[str, int] = {}
    # Attention and recurrent layers as matrix products: the counter does not know all of their own kernels.
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.set_flags(False)  # not `enabled`, which cannot be set once torch.testing has locked it
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield macs
    finally:
        for backend, was in zip(backends, enabled, strict=True):
            backend.set_flags(was)
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    root = type(model).__name__
    for name, _ in model.named_modules():
        macs[name] = flops.get(f"{root}.{name}" if name else "Global", 0) // 2


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in one mode, and attention on the path that training takes."""
    # The attribute, not train(): a module that overrides train() is asked for nothing.
    before = [(module, module.training) for module in model.modules()]
    # Shapes that do not fit are an answer here, not an error for the log.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled = log.disabled
    # Layers that Python drops at random are dropped alike in every rehearsal.
    chance = random.getstate()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        log.disabled = True
        random.seed(0)
        for module, _ in before:
            module.training = training
        yield
    finally:
        random.setstate(chance)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        log.disabled = disabled
        for module, mode in before:
            module.training = mode


def culprit(model: nn.Module, error: BaseException) -> tuple[str, str]:
    """The innermost module whose code raised an error, and the line it stopped at: ``("layer1.0", "file.py:12")``."""
    names = {id(module): name for name, module in model.named_modules()}
    cause: BaseException | None = error
    while cause is not None:
        found, line = "", ""
        trace = cause.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                found = names[id(owner)]
                line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        if line:
            return found, line
        cause = cause.__cause__
    return "", ""
