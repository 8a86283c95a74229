"""The mask stream: a counter-based generator, and draws with given inclusion probabilities.

A draw is a function of (seed, step, group, stream, place in the simplex) and of nothing else, so there is no generator
state to save, and every device sees the same masks, also after a resume.

The generator has two levels. Philox gives every row of 4096 elements three keys of its own; a keyed hash of the
position in the row gives every element its 32 bits, in a dozen integer operations that any device and any compiler
can do in the registers of the loop that uses them. Philox for every element would cost more than the rest of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROW = 4096  # elements that share their keys
TRAINING, SAMPLED = 0, 1  # streams: the masks of training steps, and those of :meth:`Impact.sampled`
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int], rounds: int = 7) -> tuple[Any, Any, Any, Any]:
    """Philox4x32: four random 32-bit words for each 128-bit counter, in int64 arithmetic.

    A product of two 32-bit words overflows a signed 64-bit integer into the right bits, so the halves come out by
    shift and mask. Seven rounds are the fewest that pass the whole of TestU01's BigCrush; ten is the usual default
    and costs 1.4 times as much.

    Args:
        counter: four words in [0, 2^32), arrays or tensors of one shape or ints, at least one no int.
        key: two words in [0, 2^32).
        rounds: number of rounds.

    Source: Salmon, Moraes, Dror & Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def row_keys(row: Any, *, seed: int, step: int, group: int, stream: int = 0) -> Tensor:
    """The keys of rows of 4096 elements, int32, three for each row.

    Args:
        row: index of the row in its simplex, int64, an array or a tensor of one dimension.
        seed, step, group, stream: the place in the stream; ``seed`` in [0, 2^64), the others in [0, 2^32).
    """
    # In NumPy, whose hundred small operations take less time to call.
    words = philox4x32((np.asarray(row), group, step & _WORD, stream), (seed & _WORD, seed >> 32 & _WORD))
    return torch.from_numpy(np.stack(words[:3], axis=1).astype(np.int32))  # wraps: the bits are what counts


def row_bits(keys: Tensor, position: Tensor) -> Tensor:
    """32 random bits for each position of each row, as int32.

    Two rounds of xor-shift and multiply, with a key before, between and after them: a keyed permutation of the 32-bit
    words. The constants are those of lowbias32, found by a search for the least avalanche bias; its last xor-shift is
    left out, since it changes none of the upper 16 bits, and it is the upper bits that decide.

    Args:
        keys: int32, [..., 3]; see :func:`row_keys`.
        position: int32, in [0, 4096); its shape must broadcast with that of one key.

    Source: C. Wellons, Prospecting for hash functions, 2018; Even & Mansour, J. Cryptology 1997, for the keys.
    """
    k0, k1, k2 = keys.unbind(-1)
    # A right shift of int32 copies the sign; the mask makes it the logical shift that the hash is made of. In place,
    # since outside a compiler each temporary costs as much as the arithmetic.
    h = position ^ k0
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= 0x7FEB352D
    h ^= k1
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= 0x846CA68B - 2**32
    h ^= k2
    return h


def kept_bits(bits: Tensor, keep: Tensor) -> Tensor:
    """All ones where 31 of the random bits, as a number in [0, 1), are below the keep probability, zeros elsewhere.

    As int32, to be combined with the bits of a float, which on a CPU is faster than a boolean mask. Exact at the
    probabilities 0 and 1.
    """
    return (bits >> 1).sub_(keep.mul(2.0**31).sub_(2.0**30).to(torch.int32)).bitwise_right_shift_(31)


def bit_blocks(
    rows: range,
    at_once: int,
    *,
    seed: int,
    step: int,
    group: int,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """The random bits of some rows of 4096 elements, some rows at once, int32, one dimension; see :func:`row_keys`."""
    # The keys are made on the CPU: they are few, and take a hundred small operations.
    keys = row_keys(np.arange(rows.start, rows.stop), seed=seed, step=step, group=group, stream=stream).unsqueeze(1)
    keys = keys.to(device, non_blocking=True)
    position = torch.arange(ROW, dtype=torch.int32, device=device)
    return (row_bits(part, position).view(-1) for part in keys.split(at_once))


def bits(rows: range, **place: Any) -> Tensor:
    """The random bits of some rows, all at once."""
    return next(bit_blocks(rows, max(len(rows), 1), **place))


def as_uniform(words: Tensor) -> Tensor:
    """Random bits as numbers, uniform on the midpoints (k + 1/2) / 2^32 of (0, 1), float64."""
    return words.double().add_(2.0**31 + 0.5).mul_(2.0**-32)


def pareto_sample(probability: Tensor, u: Tensor, size: int) -> Tensor:
    r"""A sample of exactly ``size`` elements with given inclusion probabilities, as a boolean mask.

    Keeps the ``size`` smallest of :math:`Q = \frac{u / (1 - u)}{\pi / (1 - \pi)}`. The inclusion probabilities are π up
    to an error that vanishes with the sample size; those of Gumbel top-k sampling are others.

    Args:
        probability: π in [0, 1], one dimension, with sum ``size`` up to rounding.
        u: independent uniforms on (0, 1), same shape.
        size: how many to keep.

    Source: Rosén, On sampling with probability proportional to size, 1997.
    """
    p, u = probability.double(), u.double()
    q = torch.log(u) - torch.log1p(-u) - torch.log(p) + torch.log1p(-p)
    kept = torch.argsort(q, stable=True)[:size]
    return torch.zeros_like(probability, dtype=torch.bool).index_fill_(0, kept, True)
