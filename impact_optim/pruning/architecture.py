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
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # Cloned, because safetensors refuses tensors that share memory.
    contents = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    architecture = {
        "types": {name: type(module).__qualname__ for name, module in model.named_modules()},
        "sizes": _kept_sizes(model),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    new_weights, new_architecture = folder / f"{_WEIGHTS}.new", folder / f"{_ARCHITECTURE}.new"
    save_file(contents, new_weights)
    text = {
        "format": "impact_optim.pruning",
        "version": VERSION,
        "sha256": {"architecture": _digest(architecture), _WEIGHTS: _file_digest(new_weights)},
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
    tensors = _check_model(model, architecture, folder / _ARCHITECTURE)
    _check_sizes(model, architecture, folder / _ARCHITECTURE)
    new = {name: _fitted(name, tensors[name], contents[name]) for name in tensors}
    set_integer_attributes(model, architecture["sizes"])
    for name, tensor in tensors.items():
        tensor.grad = None
        tensor.data = new[name]
    return model


# ------------------------------------------------------------------------------- attributes


def _kept_sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What tells a network: the integer attributes of torch's layers, and others that a cut may set.

    What else a module counts, such as its calls, is not of the network.
    """
    modules = dict(model.named_modules())
    return {
        name: {key: value for key, value in found.items() if _is_torchs(modules[name], key) or may_shrink(key, value)}
        for name, found in integer_attributes(model).items()
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
        if text["sha256"][_WEIGHTS] != _file_digest(folder / _WEIGHTS):
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


def _check_model(model: nn.Module, architecture: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a model by name, if it can become the one that was saved."""
    kind = type(model).__name__
    remedy = "build the model that was saved, as its code does before any cut"
    types = {name: type(module).__qualname__ for name, module in model.named_modules()}
    for name in {**types, **architecture["types"]}:
        if types.get(name) != (saved := architecture["types"].get(name)):
            raise ValueError(
                f"{kind} is not the model of {path}: {name or 'the model'!r} is {types.get(name, 'absent')} here, "
                f"{saved or 'absent'} there; {remedy}"
            )
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = architecture["shapes"]
    for name in {**tensors, **shapes}:
        if name not in tensors or name not in shapes:
            where = "here" if name in tensors else "there"
            raise ValueError(f"{kind} is not the model of {path}: there is a tensor {name!r} only {where}; {remedy}")
        ours, theirs = tuple(tensors[name].shape), tuple(shapes[name])
        if len(ours) != len(theirs) or any(a < b for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(
                f"{kind} cannot become the model of {path}: {name} has the shape {ours} here, which no cut brings to "
                f"{theirs}; {remedy}"
            )
    return tensors


def _check_sizes(model: nn.Module, architecture: dict[str, Any], path: Path) -> None:
    """Attributes may be smaller than here where a cut makes them so."""
    kind, modules, all_sizes = type(model).__name__, dict(model.named_modules()), architecture["sizes"]
    ours = _kept_sizes(model)
    for name in {**ours, **all_sizes}:
        here, there = ours.get(name, {}), all_sizes.get(name, {})
        for key in {**here, **there}:
            old, value = here.get(key), there.get(key)
            fixed = isinstance(old, list | tuple) and _is_torchs(modules[name], key)  # a stride, a kernel
            shrunk = not fixed and may_shrink(key, old) and _is_shrunk(old, value)
            if not shrunk and value != (list(old) if isinstance(old, tuple) else old):
                raise ValueError(
                    f"{kind} cannot become the model of {path}: {key} of {name or 'the model'!r} is {old!r} here, "
                    f"which no cut brings to {value!r}; build the model that was saved, as its code does before any cut"
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
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
