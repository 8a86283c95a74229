"""Keeps a pruned network as two files that need no pickle: ``architecture.json`` and ``model.safetensors``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import integer_attributes, is_integral, may_shrink, set_integer_attributes

VERSION = 1
_ARCHITECTURE, _WEIGHTS = "architecture.json", "model.safetensors"


def save_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a network and its shape to a folder, which is created; what it held under these names is replaced.

    ``model.safetensors`` holds every parameter and buffer, tied ones once. ``architecture.json`` holds their shapes,
    the type and the integer attributes of every module (``out_channels``, ``num_heads``), and checksums.

    Raises:
        ValueError: a module keeps extra state, which is no tensor.
    """
    from safetensors.torch import save_file

    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) has extra state, which cannot be kept")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share memory.
    contents = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _tensors(model).items()
    }
    architecture = _architecture(model)
    new_weights, new_architecture = folder / f"{_WEIGHTS}.new", folder / f"{_ARCHITECTURE}.new"
    save_file(contents, new_weights)
    text = {
        "format": "impact_optim.pruning",
        "version": VERSION,
        "sha256": {"architecture": _digest(architecture), _WEIGHTS: _sha256(new_weights.read_bytes())},
        "architecture": architecture,
    }
    new_architecture.write_text(json.dumps(text, indent=1), encoding="utf-8")
    new_weights.replace(folder / _WEIGHTS)
    new_architecture.replace(folder / _ARCHITECTURE)


@torch.no_grad()
def load_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Makes a freshly built network the one that :func:`save_pruned` kept, in place, and returns it.

    Its parameters stay the same objects, and keep their device, memory order and ``requires_grad``.

    Args:
        model: as the code builds it, before any cut.
        folder: of ``architecture.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, of another version, or of another model. Nothing has changed then.
    """
    folder = Path(folder)
    architecture = _read_architecture(folder)
    contents = _read_weights(folder, architecture["shapes"])
    _check_fit(model, architecture, folder / _ARCHITECTURE)
    tensors = _tensors(model)
    new = {name: _fitted(name, tensor, contents[name]) for name, tensor in tensors.items()}
    set_integer_attributes(model, architecture["sizes"])
    for name, tensor in tensors.items():
        tensor.grad = None
        tensor.data = new[name]
    return model


# ------------------------------------------------------------------------------- what tells a network


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _architecture(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Types of modules, shapes of tensors, and integer attributes: those of torch's layers and those that a cut sets.

    What else a module counts, such as its calls, is not of the network.
    """
    modules = dict(model.named_modules())
    sizes = {
        name: {key: value for key, value in found.items() if _is_torchs(modules[name], key) or may_shrink(key, value)}
        for name, found in integer_attributes(model).items()
    }
    return {
        "types": {name: type(module).__qualname__ for name, module in modules.items()},
        "sizes": sizes,
        "shapes": {name: list(tensor.shape) for name, tensor in _tensors(model).items()},
    }


def _is_torchs(module: nn.Module, key: str) -> bool:
    return type(module).__module__.startswith("torch.nn.") or key in getattr(module, "__constants__", ())


def _is_shrunk(old: Any, value: Any) -> bool:
    if isinstance(old, list | tuple) and isinstance(value, list):
        return len(old) == len(value) and all(a == b or _is_shrunk(a, b) for a, b in zip(old, value, strict=True))
    return isinstance(old, int) and isinstance(value, int) and 0 < value < old


# ------------------------------------------------------------------------------- reading


def _read_architecture(folder: Path) -> dict[str, Any]:
    path = folder / _ARCHITECTURE
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        kind, version = text["format"], text["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no file of save_pruned(): {error!r}") from error
    if kind != "impact_optim.pruning":
        raise ValueError(f"{path} is of the format {kind!r}, not one that save_pruned() writes")
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version!r}, and this package reads version {VERSION}: update the older"
        )
    try:
        if text["sha256"]["architecture"] != _digest(text["architecture"]):
            raise ValueError(f"{path} is damaged: its checksum differs. Save the network again")
        if text["sha256"][_WEIGHTS] != _sha256((folder / _WEIGHTS).read_bytes()):
            raise ValueError(
                f"{folder / _WEIGHTS} is damaged, or was not saved together with {_ARCHITECTURE}: its checksum "
                "differs. Save the network again"
            )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Save the network again") from error
    architecture = text["architecture"]
    is_entry: dict[str, Callable[[Any], bool]] = {
        "types": lambda value: isinstance(value, str),
        "shapes": is_integral,
        "sizes": lambda value: isinstance(value, dict) and all(map(is_integral, value.values())),
    }
    for part in is_entry:
        entries = architecture.get(part) if isinstance(architecture, dict) else None
        if not isinstance(entries, dict) or not all(map(is_entry[part], entries.values())):
            raise ValueError(f"{path} is damaged: its {part} are not what save_pruned() writes. Save the network again")
    return architecture


def _read_weights(folder: Path, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _WEIGHTS
    try:
        contents = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Save the network again") from error
    if {name: list(tensor.shape) for name, tensor in contents.items()} != shapes:
        raise ValueError(f"{path} has other tensors than {_ARCHITECTURE} says")
    return contents


def _check_fit(model: nn.Module, there: dict[str, dict[str, Any]], path: Path) -> None:
    """Raises if no cut makes what was saved of a model: tensors and attributes may be smaller, and nothing else."""
    here, modules = _architecture(model), dict(model.named_modules())
    is_not = f"{type(model).__name__} is not the model of {path}:"
    cannot = f"{type(model).__name__} cannot become the model of {path}:"
    remedy = "build the model that was saved, as its code does before any cut"
    for name in {**here["types"], **there["types"]}:
        ours, theirs = (part["types"].get(name, "absent") for part in (here, there))
        if ours != theirs:
            raise ValueError(f"{is_not} {name or 'the model'!r} is {ours} here, {theirs} there; {remedy}")
    for name in sorted(here["shapes"].keys() ^ there["shapes"].keys()):
        where = "here" if name in here["shapes"] else "there"
        raise ValueError(f"{is_not} there is a tensor {name!r} only {where}; {remedy}")
    for name in here["shapes"]:
        ours, theirs = (tuple(part["shapes"][name]) for part in (here, there))
        if len(ours) != len(theirs) or any(a < b for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(f"{cannot} {name} has the shape {ours} here, which no cut brings to {theirs}; {remedy}")
    for name in {**here["sizes"], **there["sizes"]}:
        ours, theirs = (part["sizes"].get(name, {}) for part in (here, there))
        for key in {**ours, **theirs}:
            old, value = ours.get(key), theirs.get(key)
            fixed = isinstance(old, list | tuple) and _is_torchs(modules[name], key)  # a stride, a kernel
            shrunk = not fixed and may_shrink(key, old) and _is_shrunk(old, value)
            if not shrunk and value != (list(old) if isinstance(old, tuple) else old):
                raise ValueError(
                    f"{cannot} {key} of {name or 'the model'!r} is {old!r} here, which no cut brings to {value!r}; "
                    f"{remedy}"
                )


def _fitted(name: str, tensor: Tensor, content: Tensor) -> Tensor:
    """The content as the tensor of the model is kept: its device and order in memory."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: build the model with memory, or call model.to_empty() first")
    if tensor.dtype != content.dtype:
        raise ValueError(f"{name} was saved as {content.dtype} and is {tensor.dtype} here: convert the model first")
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return torch.empty_permuted(content.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(content)


def _digest(architecture: Any) -> str:
    return _sha256(json.dumps(architecture, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
