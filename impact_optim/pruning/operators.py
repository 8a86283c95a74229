"""What each ATen operator does to labels.

One without a rule is taken apart, as torch makes it of others; where that is not known, it freezes what reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .coupling import CONSUMER, PRODUCER
from .labels import Value, core, flat, index0, is_value, stretched, varied
from .propagation import Propagation, Rule, blank
from .transcript import CREATED


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _elementwise(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    values = [value for value in tree_leaves(list(bound.values()), is_leaf=is_value) if is_value(value)]
    result = run.combine(_shape(node), values)
    result.uniform = all(value.uniform or not value.shape for value in values)
    return result


def _cast(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """Elementwise; another tensor only says which type."""
    return _elementwise(run, {"self": bound["self"]}, node)


def _created(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    return Value(_shape(node), uniform=True)


def _plain(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    return blank(node)


def _moved(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    """Runs an operator that only moves data on the labels."""
    value = bound["self"]
    rest = {name: argument for name, argument in bound.items() if name != "self"}
    results = [node.target(self=labels, **rest) for labels in value.labels]  # type: ignore[operator]
    if isinstance(node.meta["val"], (tuple, list)):
        return [
            Value(part.shape, run.tidy(result[i] for result in results), uniform=value.uniform)
            for i, part in enumerate(blank(node))
        ]
    return Value(_shape(node), run.tidy(results), uniform=value.uniform)


def _reshaped(change: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Rule:
    """Gives the labels another shape, as the data."""

    def rule(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
        value, shape = bound["self"], _shape(node)
        return Value(shape, run.tidy(change(labels, shape) for labels in value.labels), uniform=value.uniform)

    return rule


def _divided(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    """Equal parts stay equal: what is at the same position in each of them goes together."""
    value, dim = bound["self"], bound["dim"]
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if len(set(sizes)) == 1:
        for labels in value.labels:
            run.join_over(labels.unflatten(dim, (len(sizes), sizes[0])), [dim % labels.dim()])
    return _moved(run, bound, node)


def _joined(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    shape, dim = _shape(node), bound.get("dim", 0)
    values = [value for value in bound["tensors"] if value.shape != (0,)]
    dim %= len(shape)
    if len(values[0].shape) < len(shape):  # stack
        values = [
            Value((*v.shape[:dim], 1, *v.shape[dim:]), [a.unsqueeze(dim) for a in v.labels], uniform=v.uniform)
            for v in values
        ]
    # Where a part has units across the dimension alone, heads for instance, the others have no smaller ones.
    other = {d for value in values for a in value.labels if dim not in varied(a) for d in varied(a)}
    for i, value in enumerate(values):
        grids = [dim in varied(a) and not other.isdisjoint(varied(a)) for a in value.labels]
        for labels in (a for a, grid in zip(value.labels, grids, strict=True) if grid):
            run.join_over(labels, [dim])
        arrays = [flat(a, dim) if grid else a for a, grid in zip(value.labels, grids, strict=True)]
        values[i] = Value(value.shape, arrays, uniform=value.uniform)
    across, along = [], []
    for value in values:
        ours = [labels for labels in value.labels if dim in varied(labels)]
        for labels in ours[1:]:
            run.freeze(labels, f"{run.where()} joins a doubly labelled tensor")
        along.append(ours[0] if ours else torch.tensor(-1).expand(value.shape))
        rest = [index0(labels, [dim], keepdim=True) for labels in value.labels if dim not in varied(labels)]
        across.append(Value((*value.shape[:dim], 1, *value.shape[dim + 1 :]), rest, uniform=value.uniform))
    common = run.combine((*shape[:dim], 1, *shape[dim + 1 :]), across)
    return Value(shape, run.tidy([torch.cat(along, dim), *(labels.expand(shape) for labels in common.labels)]))


def _padded(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, shape = bound["self"], _shape(node)
    amounts = bound["pad"] if "pad" in bound else bound["padding"]
    constant = bound.get("mode", "constant") == "constant" and run.operator() in ("aten::pad", "aten::constant_pad_nd")
    rank, kept = len(value.shape), []
    for labels in value.labels:
        dims = varied(labels)
        padding = []
        for dim in reversed(range(rank)):
            around = amounts[2 * (rank - 1 - dim) : 2 * (rank - dim)] if dim in dims else ()
            padding += list(around) or [0, 0]
        if any(padding) and not constant:
            run.freeze(labels, f"{run.where()} repeats them")
        # What is filled in belongs to no unit.
        padded = F.pad(labels, padding, value=-1) if any(padding) else labels
        kept.append(index0(padded, set(range(rank)).difference(dims), keepdim=True).expand(shape))
    return Value(shape, run.tidy(kept))


def _indexed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """Indexing by tensors: the indexed dimensions cannot be cut, the others are carried along."""
    indices = bound["indices"] if "indices" in bound else [None] * (bound["dim"] % len(_shape(node))) + [bound["index"]]
    for index in indices:
        run.freeze(index, f"{run.where()} uses them as an index")
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    value = run.mix(bound["self"], dims, "picks them by number")
    # All numbers are as good as 0 along dimensions where the labels are constant.
    probe = [None if index is None else torch.zeros(index.shape, dtype=torch.int64) for index in indices]
    return Value(_shape(node), run.tidy(torch.ops.aten.index.Tensor(labels, probe) for labels in value.labels))


def _reduced(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    if is_value(bound.get("other")):  # torch.max and torch.min of two tensors
        return _elementwise(run, bound, node)
    value = bound["self"]
    dims = bound.get("dim")
    rank = len(value.shape)
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted({dim % max(rank, 1) for dim in dims})
    result = run.mix(value, dims)
    output = blank(node)
    parts = output if isinstance(output, list) else [output]
    for part in parts:
        part.labels = run.tidy(index0(labels, dims, keepdim=len(part.shape) == rank) for labels in result.labels)
        part.uniform = result.uniform
    return output


def _mixed(dims: Sequence[int] | None = None, why: str = "mixes the units") -> Rule:
    """Mixes what is along some dimensions, by default those that an argument names; their size may change."""

    def rule(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
        along = bound.get("dim", -1) if dims is None else dims
        result = run.mix(
            bound["self"] if "self" in bound else bound["input"], [along] if isinstance(along, int) else along, why
        )
        output = blank(node)
        for part in output if isinstance(output, list) else [output]:
            part.labels = run.tidy(stretched(labels, part.shape) for labels in result.labels)
            part.uniform = result.uniform and "softmax" in run.operator()
        return output

    return rule


def _with_channels(run: Propagation, value: Value, vectors: Iterable[Value | None]) -> Value:
    """A tensor that meets vectors with an element per channel."""
    after = [1] * (len(value.shape) - 2)
    placed = [Value((*v.shape, *after), [a.reshape(-1, *after) for a in v.labels]) for v in vectors if v is not None]
    return run.combine(value.shape, [value, *placed])


def _normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """Batch norm and instance norm."""
    value = bound["input"]
    value = run.mix(value, [dim for dim in range(len(value.shape)) if dim != 1])
    result = _with_channels(run, value, [bound[n] for n in ("weight", "bias", "running_mean", "running_var")])
    for labels in result.labels:
        run.size_follows("num_features", labels, 1)
    run.see("output", result, nn.Module)
    return result


def _group_normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, groups = bound["input"], bound["num_groups"]
    spatial = range(2, len(value.shape))
    result = _with_channels(run, run.mix(value, spatial), [bound["weight"], bound["bias"]])
    for labels in result.labels:
        grouped = index0(labels, spatial).unflatten(1, (groups, -1))
        if groups == 1 and 1 in varied(labels):
            run.freeze(labels, f"{run.where()} mixes the units")
        run.join_over(grouped, [2])
        run.size_follows("num_channels", labels, 1)
        run.size_follows("num_groups", grouped.select(2, 0), 1)
    return result


def _layer_normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value = bound["input"]
    rank = len(value.shape)
    dims = range(rank - len(bound["normalized_shape"]), rank)
    value = run.mix(value, dims)
    affine = [bound[name] for name in ("weight", "bias") if bound.get(name) is not None]
    for vector in affine:
        run.freeze(vector, None)
    value.uniform = value.uniform and not affine
    return value


def _prelu(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, weight = bound["self"], bound["weight"]
    if weight.shape == (1,) or len(value.shape) < 2:
        return run.combine(value.shape, [value, weight])
    result = _with_channels(run, value, [weight])
    for labels in result.labels:
        run.size_follows("num_parameters", labels, 1)
    return result


def _linear(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, weight, bias = bound["input"], bound["weight"], bound["bias"]
    run.see("input", value, nn.Linear)
    for labels in value.labels:
        run.size_follows("in_features", labels, labels.dim() - 1)
    free = "abcdefgh"[: len(value.shape) - 1]
    result = run.contract(
        value, weight, (free + "k", "ok"[2 - len(weight.shape) :], free + "o"[2 - len(weight.shape) :])
    )
    if bias is not None:
        result = run.combine(result.shape, [result, bias])
    for labels in result.labels:
        run.size_follows("out_features", labels, labels.dim() - 1)
    run.see("output", result, nn.Linear)
    return result


def _convolution(transposed: bool) -> Rule:
    def rule(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
        value, weight, bias, groups = bound["input"], bound["weight"], bound["bias"], bound["groups"]
        shape, spatial = _shape(node), len(weight.shape) - 2
        single = len(value.shape) == spatial + 1  # a sample by itself
        run.see("input", value, nn.modules.conv._ConvNd)
        taps = range(2, 2 + spatial)
        mixed = [a.unsqueeze(0) if single else a for a in run.mix(value, range(-spatial, 0)).labels]
        inputs = Value((1, *value.shape)[-2 - spatial : -spatial], [index0(a, taps) for a in mixed], value.weight)
        for labels in weight.labels:
            if not {0, 1}.issuperset(varied(labels)):
                run.freeze(labels, None)
        rows = [index0(labels, taps) for labels in weight.labels if {0, 1}.issuperset(varied(labels))]
        kernel = Value(weight.shape[:2], rows, weight.weight)
        for labels in inputs.labels:
            run.size_follows("in_channels", labels, 1)
        if groups == 1:
            result = run.contract(inputs, kernel, ("nk", "ko" if transposed else "ok", "no"))
        else:
            result = _grouped(run, inputs, kernel, groups, transposed)
        if bias is not None:
            result = run.combine(result.shape, [result, bias])
        for labels in result.labels:
            run.size_follows("out_channels", labels, 1)
        arrays = [labels.reshape(*labels.shape, *[1] * spatial) for labels in result.labels]
        result = Value(shape, [(labels[0] if single else labels).expand(shape) for labels in arrays])
        run.see("output", result, nn.modules.conv._ConvNd)
        return result

    return rule


def _grouped(run: Propagation, inputs: Value, kernel: Value, groups: int, transposed: bool) -> Value:
    """A group of the convolution, its input and its output channels, is one unit: each reads nothing but its own."""
    batch = inputs.shape[0]
    width = kernel.shape[1] if transposed else kernel.shape[0] // groups
    for labels in kernel.labels:
        if 1 in varied(labels):
            run.freeze(labels, None)
    outer = [labels[:, 0] for labels in kernel.labels if 0 in varied(labels)]
    for labels in outer:
        run.roles[CONSUMER if transposed else PRODUCER].append(labels.unique())
    outer = [labels.unflatten(0, (groups, -1)) for labels in outer]
    arrays = [labels for labels in inputs.labels if 1 in varied(labels)]
    if not arrays or not outer:
        for labels in arrays:
            run.freeze(labels, f"{run.where()} combines them with what is not cut")
        for labels in outer:
            run.freeze(labels, None)
        rest = [labels[:, :1].expand(batch, groups * width) for labels in inputs.labels if 1 not in varied(labels)]
        return Value((batch, groups * width), rest)
    lead = outer[0][:, :1]
    run.join_over(outer[0], [1])
    for labels in arrays:
        run.join_over(labels, [0])
        grouped = labels[0].unflatten(0, (groups, -1))
        run.join_over(grouped, [1])
        run.atoms.join(grouped, lead.expand_as(grouped), f"{run.where()} combines them with what is not cut")
    run.size_follows("groups", lead[:, 0], 0)
    out = outer[0] if not transposed else lead.expand(groups, width)
    return Value((batch, groups * width), [out.reshape(1, -1).expand(batch, -1)])


def _embedding(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    weight, shape = bound["weight"], _shape(node)
    run.freeze(bound["indices"], f"{run.where()} uses them as an index")
    kept = []
    for labels in weight.labels:
        if 0 in varied(labels):
            run.freeze(labels, None)
        else:
            run.roles[PRODUCER].append(core(labels).reshape(-1).unique())
            run.size_follows("embedding_dim", labels, 1)
            kept.append(labels[0].expand(shape))
    return Value(shape, kept)


def _matmul(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """A product of vectors, matrices or batches of them, to which something may be added."""
    names = next(names for names in _FACTORS if bound.keys() >= set(names))
    first, second = (bound[name] for name in names)
    one, two = len(first.shape), len(second.shape)
    batch = "abcdefgh"[: max(one, two, 2) - 2]
    left, right = ("n" if one > 1 else "") + "k", "k" + ("m" if two > 1 else "")
    letters = (batch[len(batch) - max(one - 2, 0) :] + left, batch[len(batch) - max(two - 2, 0) :] + right)
    product = run.contract(first, second, (*letters, batch + left[:-1] + right[1:]))
    return product if "self" in names else run.combine(product.shape, [product, bound["self"]])


_FACTORS = [
    ("mat1", "mat2"), ("batch1", "batch2"), ("mat", "vec"),
    ("self", "mat2"), ("self", "other"), ("self", "vec"), ("self", "tensor"),
]  # fmt: skip


def _einsum(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    values = list(bound["tensors"])
    terms, _, out = bound["equation"].replace(" ", "").partition("->")
    inputs = terms.split(",")
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in terms]
    if "->" not in bound["equation"] or any(
        len(set(t.replace("...", ""))) != len(t.replace("...", "")) for t in inputs
    ):
        return run.unknown(values, node)
    longest = max((len(v.shape) - len(t) + 3 for t, v in zip(inputs, values, strict=True) if "..." in t), default=0)
    extra = "".join(spare[:longest])
    inputs = [
        term.replace("...", extra[len(extra) - (len(value.shape) - len(term) + 3) :] if "..." in term else "")
        for term, value in zip(inputs, values, strict=True)
    ]
    out = out.replace("...", extra)
    total, letters = values[0], inputs[0]
    for position, (value, term) in enumerate(zip(values[1:], inputs[1:], strict=True), start=1):
        later = out + "".join(inputs[position + 1 :])
        kept = "".join(dict.fromkeys(letter for letter in letters + term if letter in later))
        total, letters = run.contract(total, value, (letters, term, kept)), kept
    summed = [dim for dim, letter in enumerate(letters) if letter not in out]
    total = run.mix(total, summed) if summed else total
    order = [letter for letter in letters if letter in out]
    kept_labels = [index0(a, summed).permute([order.index(letter) for letter in out]) for a in total.labels]
    return Value(_shape(node), run.tidy(kept_labels))


def _attention(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    query, key, value = bound["query"], bound["key"], bound["value"]
    last = len(query.shape) - 1
    if bound.get("scale") is None:
        for operand in (query, key):
            for labels in operand.labels:
                if varied(labels) == [last]:
                    run.freeze(labels, f"{run.where()} is scaled by the width of a head")
    if bound.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        key, value = (
            Value(
                (*v.shape[:-3], query.shape[-3], *v.shape[-2:]),
                run.tidy(labels.repeat_interleave(query.shape[-3] // v.shape[-3], dim=-3) for labels in v.labels),
            )
            for v in (key, value)
        )
    batch = "abcdefgh"[: last - 1]
    scores = run.contract(query, key, (batch + "nd", batch + "md", batch + "nm"))
    if bound.get("attn_mask") is not None:
        scores = run.combine(scores.shape, [scores, bound["attn_mask"]])
    scores = run.mix(scores, [last])
    return run.contract(scores, value, (batch + "nm", batch + "me", batch + "ne"))


def _weight_normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    direction, length, dim = bound["v"], bound["g"], bound["dim"]
    run.mix(direction, set(range(len(direction.shape))) - {dim % len(direction.shape)})
    return run.combine(direction.shape, [direction, length])


def _opaque(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    for value in bound["inputs"]:
        run.freeze(value, f"{run.module()} is ignored")
    return Value(_shape(node))


def _unfolded(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """im2col: every channel becomes one row for each tap of the kernel."""
    value, shape = run.mix(bound["self"], (-1, -2)), _shape(node)
    taps = bound["kernel_size"][0] * bound["kernel_size"][1]
    kept = [labels[..., 0, 0].repeat_interleave(taps, -1).unsqueeze(-1).expand(shape) for labels in value.labels]
    return Value(shape, run.tidy(kept))


def _sampled(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """grid_sample: picks places by coordinates. Samples and channels are carried along."""
    shape, rank = _shape(node), len(bound["input"].shape)
    value, grid = run.mix(bound["input"], range(2, rank)), run.mix(bound["grid"], [rank - 1])
    inner = (*shape[:2], *[1] * (rank - 2))
    places = (shape[0], 1, *shape[2:])
    image = Value(inner, [index0(labels, range(2, rank), keepdim=True) for labels in value.labels])
    return run.combine(shape, [image, Value(places, [labels.select(-1, 0).unsqueeze(1) for labels in grid.labels])])


def _recurrent(gates: int) -> Rule:
    """LSTM, GRU and plain ones: a unit is an element of the hidden state, in all layers and directions.

    The rows of all gates make it, the columns of the recurrent weights and of the next layer read it.
    """

    def rule(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
        params, parts = bound["params"], blank(node)
        directions, per_layer = 1 + bound.get("bidirectional", False), 4 if bound["has_biases"] else 2
        states = bound["hx"] if isinstance(bound["hx"], (tuple, list)) else [bound["hx"]]
        size = states[0].shape[-1]
        value = bound.get("input")
        if value is None or len(params) != per_layer * directions * bound["num_layers"]:  # packed, or projected
            return run.unknown([*(value or bound["data"],), *states, *params], node)
        run.see("input", value, nn.RNNBase)
        for labels in value.labels:
            run.size_follows("input_size", labels, labels.dim() - 1)
        unit: Tensor | None = None
        while params:
            value, outputs = run.mix(value, [0, 1]), list[Tensor]()
            for _ in range(directions):
                (w_input, w_hidden, *biases), params = params[:per_layer], params[per_layer:]
                rows = run.contract(value, w_input, ("abk", "ok", "abo"))
                rows = run.combine(rows.shape, [rows, *biases])
                made = [labels.unflatten(-1, (gates, size)) for labels in rows.labels]
                for labels in made:
                    run.join_over(labels, [2])
                hidden = Value((*rows.shape[:2], size), [labels.select(2, 0) for labels in made])
                run.combine(rows.shape, [rows, run.contract(hidden, w_hidden, ("abk", "ok", "abo"))])
                outputs.append(index0(made[0], [0, 1, 2]) if made else torch.full((size,), -1))
                unit = outputs[-1] if unit is None else unit
                run.atoms.join(unit, outputs[-1], f"{run.where()} has one hidden size for all of its layers")
            along = torch.cat(outputs)
            value = Value((*value.shape[:2], len(along)), [along.expand(*value.shape[:2], -1)])
        assert unit is not None
        run.size_follows("hidden_size", unit, 0)
        for state in states:
            run.combine(state.shape, [Value(state.shape, [unit.expand(state.shape)]), state])
        parts[0].labels = [value.labels[0].expand(parts[0].shape)]
        for part in parts[1:]:
            part.labels = [unit.expand(part.shape)]
        return parts

    return rule


ELEMENTWISE = [
    "abs", "absolute", "neg", "negative", "positive", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10",
    "sqrt", "rsqrt", "square", "reciprocal", "sign", "sgn", "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "sigmoid", "log_sigmoid", "logit",
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardtanh", "hardsigmoid",
    "hardswish", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "threshold", "clamp",
    "clamp_min", "clamp_max", "clip", "round", "floor", "ceil", "trunc", "frac", "fix", "nan_to_num", "isnan",
    "isinf", "isfinite", "rrelu", "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide",
    "true_divide", "floor_divide", "remainder", "fmod", "pow", "maximum", "minimum", "fmax", "fmin", "addcmul",
    "addcdiv", "lerp", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not",
    "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "where", "masked_fill", "fill",
    "copy", "zero", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "bernoulli",
    "native_dropout", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "detach_copy",
    "alias_copy", "heaviside", "hypot", "xlogy", "logaddexp", "data", "requires_grad", "__and__", "__or__", "__xor__",
    "__iand__", "__ior__",
]  # fmt: skip
PLAIN = [
    "arange", "linspace", "eye", "tril_indices", "triu_indices", "tensor", "randint", "randperm", "sym_size",
    "_assert_tensor_metadata",
]  # fmt: skip
RESHAPED = [
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "_unsafe_view",
    "ravel", "atleast_1d", "atleast_2d", "atleast_3d",
]  # fmt: skip
MOVED = [
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "numpy_T", "mT", "adjoint", "slice",
    "select", "narrow", "split_with_sizes", "unbind", "roll", "flip", "fliplr", "flipud", "rot90", "repeat", "tile",
    "repeat_interleave", "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tensor_split",
]  # fmt: skip
REDUCED = [
    "sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "var", "std", "var_mean", "std_mean", "norm",
    "linalg_vector_norm", "logsumexp", "argmax", "argmin", "median", "mode", "count_nonzero", "nansum", "nanmean",
    "aminmax",
]  # fmt: skip
LOCAL = {
    n: [*names, *(f"{a}{kind}_pool{n}d" for a in ("", "adaptive_") for kind in ("avg", "max")), f"upsample_nearest{n}d"]
    for n, names in {
        1: ["upsample_linear1d"],
        2: ["max_pool2d_with_indices", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
            "_upsample_bicubic2d_aa"],
        3: ["max_pool3d_with_indices", "upsample_trilinear3d"],
    }.items()
}  # fmt: skip
"""Pooling and interpolation, by how many of the last dimensions are mixed and change their size."""
MIXED = ["softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"]

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(["to", "_to_copy", "type_as"], _cast),
    **dict.fromkeys(CREATED, _created),
    **dict.fromkeys(PLAIN, _plain),
    **dict.fromkeys(RESHAPED, _reshaped(Tensor.reshape)),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _reshaped(Tensor.broadcast_to)),
    **dict.fromkeys(MOVED, _moved),
    **dict.fromkeys(["chunk", "split"], _divided),
    **dict.fromkeys(["cat", "concat", "concatenate", "stack"], _joined),
    **dict.fromkeys(["pad", "constant_pad_nd"], _padded),
    **dict.fromkeys([f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)], _padded),
    **dict.fromkeys(["index", "index_select"], _indexed),
    **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(MIXED, _mixed()),
    **dict.fromkeys(["topk", "sort"], _mixed(why="compares the units")),  # the order depends on all of them
    **{name: _mixed(range(-n, 0)) for n, names in LOCAL.items() for name in names},
    **dict.fromkeys(["batch_norm", "instance_norm"], _normed),
    "group_norm": _group_normed,
    **dict.fromkeys(["layer_norm", "rms_norm"], _layer_normed),
    "prelu": _prelu,
    "linear": _linear,
    **{f"conv{n}d": _convolution(False) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(True) for n in (1, 2, 3)},
    "embedding": _embedding,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"], _matmul),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "im2col": _unfolded,
    **dict.fromkeys(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d"], _sampled),
    **{"lstm": _recurrent(4), "gru": _recurrent(3), "rnn_tanh": _recurrent(1), "rnn_relu": _recurrent(1)},
    "_weight_norm": _weight_normed,
    "impact_optim::opaque": _opaque,
}
