"""The kernels for CPUs: builds ``cpu.cpp`` where there is a C++ compiler, and calls it with lists of tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..simplex import CLIP, SCALE_DECAY, level_sample

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
SIGNALS = {"uniform": 0, "saliency": 1, "fisher": 2, "magnitude": 3, "lookahead": 4, "hypergradient": 4}
IMPORTANCES, GRADIENT, SGD, ADAMW = range(4)
"""What follows the mirror step: nothing, the masked gradients, or the step of a base optimizer."""

_TENSORS = ("grad", "out", "first_moment", "second_moment", "largest_moment", "last_step", "steps")
_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_MACHINE_FLAGS = [["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []]  # the first that compile


class Group(Structure):
    """What holds for all tensors of a group; the fields are those of ``cpu.cpp``."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "signal", "rule", "threads")),
        *((name, c_int32) for name in ("holds_zeros", "maximize", "drops_important", "is_constant")),
        *((name, c_float) for name in ("inverse_scale", "rate", "shrink", "level", "keep_floor", "divisor")),
        ("seed", c_uint64),
        *((name, c_uint32) for name in ("step", "group", "stream", "nesterov")),
        *((name, c_double) for name in ("lr", "weight_decay", "momentum", "dampening", "beta1", "beta2", "eps")),
    ]


class Entry(Structure):
    """One tensor; the fields are those of ``Tensor`` in ``cpu.cpp``."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "grad", "out", "first_moment", "second_moment", "largest_moment")),
        *((name, c_void_p) for name in ("last_step", "log_importance", "steps")),
        *((name, c_int64) for name in ("size", "start")),
        *((name, c_int32) for name in ("is_masked", "is_first")),
    ]


# ------------------------------------------------------------------------------ the library


@functools.cache
def library() -> Any:
    """The compiled kernels; ``None``, with a warning, where they cannot be compiled.

    They are compiled once for a processor, in two or three seconds, and kept in ``~/.cache/impact_optim`` (or under
    ``XDG_CACHE_HOME``). ``CXX`` names the compiler, and ``CXXFLAGS`` adds to its options.
    """
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    problem = "there is no C++ compiler"
    if compiler is not None:
        for flags in _MACHINE_FLAGS:
            try:
                return _declared(ctypes.CDLL(str(_built(compiler, [*_FLAGS, *flags]))))
            except (OSError, subprocess.SubprocessError) as error:
                problem = f"{compiler} failed: {getattr(error, 'stderr', '') or error}".strip().splitlines()[0]
    warnings.warn(
        f"impact_optim steps on CPUs by tensor code, several times slower than its kernels: {problem}. Install g++ or "
        "clang++, or pass fused=False to say that this is meant",
        stacklevel=2,
    )
    return None


def _built(compiler: str, flags: list[str]) -> Path:
    """The compiled library in the cache; makes it if it is not there."""
    command = [compiler, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    source = _SOURCE.read_bytes()
    name = hashlib.sha256(b"\0".join([source, shlex.join(command).encode(), _processor().encode()])).hexdigest()[:20]
    for folder in _caches():
        path = folder / f"{name}.so"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
                continue  # code of another user is not run
            if path.exists():
                return path
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / path.name
                subprocess.run(
                    [*command, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, text=True, timeout=120
                )
                made.replace(path)  # at once, beside other processes that do the same
            return path
        except OSError:  # it cannot be written
            continue
    raise OSError("no folder to keep the compiled kernels in")


def _caches() -> list[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return [Path(home) / "impact_optim", Path(tempfile.gettempdir()) / f"impact_optim-{user}"]


def _processor() -> str:
    """What code for this very processor depends on: a home folder may be shared by different machines."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name", "isa")]
        return "\n".join(dict.fromkeys(found))
    return f"{platform.machine()} {platform.processor()} {platform.platform()}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in {
        "impact_mask": (),
        "impact_factors": (),
        "impact_step": (c_void_p,),
        "impact_level": (c_double, c_int64),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = (c_void_p, c_void_p, c_int64, *arguments), None
    library.impact_level.restype = c_double
    return library


# --------------------------------------------------------------------------- lists of tensors


class Weights:
    """The weights of one parameter group, as the kernels take them.

    Args:
        members: the weights, such that :func:`fits`.
        starts: where each begins in its group.
    """

    def __init__(self, members: Sequence[Tensor], starts: Sequence[int]) -> None:
        self.members = list(members)
        self.dtype = members[0].dtype
        self.flat: Tensor | None = None
        self._set: frozenset[str] = frozenset()
        """The fields for tensors of a step that are not null."""
        self._layouts = [(p.shape, p.stride()) for p in members]
        self._index = {p: i for i, p in enumerate(members)}
        self._table = (Entry * len(members))()
        for entry, p, start in zip(self._table, members, starts, strict=True):
            entry.size, entry.start = p.numel(), start

    def set_importances(self, flat: Tensor) -> None:
        """Tells where the log-importances lie, float32, one dimension."""
        self.flat = flat
        for entry in self._table:
            entry.log_importance = flat.data_ptr() + 4 * entry.start

    def group(self, **fields: Any) -> Group:
        return Group(dtype=DTYPES[self.dtype], **fields)

    def copy(self, group: Group) -> Group:
        return Group.from_buffer_copy(group)

    def set_level(self, group: Group, mean: float) -> None:
        """As :func:`impact_optim.simplex.fill_level`, of the weights that live."""
        for entry, p in zip(self._table, self.members, strict=True):
            entry.weight = p.data_ptr()
        n = sum(entry.size for entry in self._table)
        group.level = self._call("impact_level", group, self._table, len(self._table), mean, level_sample(n))

    def factor(self, group: Group, param: Tensor) -> Tensor:
        """What a weight is multiplied with by the mask that ``group`` describes, float32."""
        return self._make("impact_factors", group, param, None)

    def masked(self, group: Group, param: Tensor) -> Tensor:
        """The masked weight."""
        if param.dtype is not self.dtype:  # it had another when the masks were drawn
            return param * self.factor(group, param).to(param.dtype)
        return self._make("impact_mask", group, param, param)

    def _make(self, function: str, group: Group, param: Tensor, weight: Tensor | None) -> Tensor:
        i = self._index[param]
        shape, strides = self._layouts[i]  # as they were when the masks were drawn
        entry = Entry.from_buffer_copy(self._table[i])
        with torch._C._DisableFuncTorch():  # inside a transform, a new tensor would have no memory
            out = torch.empty_strided(shape, strides, dtype=torch.float32 if weight is None else weight.dtype)
            if weight is not None:
                weight = weight.detach()
                if weight.shape != shape:
                    raise RuntimeError(f"a weight of shape {tuple(shape)} has become {tuple(weight.shape)} in a step")
                if weight.stride() != strides:
                    weight = torch.empty_strided(shape, strides, dtype=weight.dtype).copy_(weight)
                entry.weight = weight.data_ptr()
            entry.out = out.data_ptr()
            self._call(function, group, ctypes.addressof(entry), 1)
        return out

    def _call(self, function: str, group: Group, *arguments: Any) -> Any:
        group.threads = torch.get_num_threads()
        return getattr(library(), function)(ctypes.addressof(group), *arguments)

    def step(
        self,
        group: Group,
        tensors: Mapping[str, Sequence[Tensor | None]],
        masked: Sequence[bool],
        first: Sequence[bool],
        scale: Tensor | float,
    ) -> Tensor | float:
        r"""The mirror step, and what ``group.rule`` says, in place.

        Args:
            group: of the step.
            tensors: by the name of a field, that tensor for each weight, laid out like the weight.
            masked: of each weight, whether its gradient came through the mask.
            first: of each weight, whether its first moment is still to begin.
            scale: the running mean of \|h\|; 0 stands for none yet.

        Returns:
            The scale after the step.
        """
        for entry, p, is_masked, is_first in zip(self._table, self.members, masked, first, strict=True):
            entry.weight, entry.is_masked, entry.is_first = p.data_ptr(), is_masked, is_first
        for name in _TENSORS:
            given = tensors.get(name) or ()
            if not given and name not in self._set:
                continue
            for entry, t in zip(self._table, given or [None] * len(self._table), strict=True):
                setattr(entry, name, None if t is None else t.data_ptr())
            self._set = self._set | {name} if given else self._set - {name}
        before = float(scale)
        # No signal is used before its scale is known: the first one only sets it.
        group.inverse_scale = 1.0 / before if before > torch.finfo(torch.float32).tiny else 0.0
        result = (c_double * 2)()
        self._call("impact_step", group, self._table, len(self._table), result)
        if not group.signal:
            return scale
        mean = result[0] / max(result[1], 1.0)
        mean = mean if mean <= torch.finfo(torch.float32).max else 0.0  # a sum of finite signals may still overflow
        if before > 0:  # as next_scale()
            mean = before + (min(mean, CLIP * before) - before) * (1 - SCALE_DECAY)
        return torch.tensor(mean, dtype=torch.float32)
