"""The mask stream: a counter-based generator, and draws with given inclusion probabilities.

A draw is a function of (seed, step, tensor index, rank, element index) and of nothing else, so there is no generator
state to save, and every implementation and device sees the same masks, also after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_BLOCK = 1 << 16  # counters at a time on a CPU: what one block touches stays in the cache


def philox4x32(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int], rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four random 32-bit words for each 128-bit counter, in int64 tensor arithmetic.

    A product of two 32-bit words overflows a signed 64-bit integer into the right bits, so the halves come out by
    shift and mask. Seven rounds are the fewest that pass the whole of TestU01's BigCrush; ten is the usual default
    and costs 1.4 times as much.

    Args:
        counter: four words in [0, 2^32), tensors of one shape or ints, at least one of them a tensor.
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
    return c0, c1, c2, c3  # type: ignore[return-value]


def uniform(
    n: int, *, seed: int, step: int, tensor: int, rank: int = 0, bits: int = 16, device: torch.device | str = "cpu"
) -> Tensor:
    """n numbers of the stream, uniform on the midpoints (k + 1/2) / 2^bits of (0, 1).

    Element i of a tensor comes from word ``i // q`` of counter ``i % q``, where q counters give n numbers. With 16
    bits one call of the generator serves eight weights, and a keep probability is met to within 2^-17.

    Args:
        n: how many.
        seed, step, tensor, rank: the place in the stream; ``seed`` in [0, 2^64), the others in [0, 2^32).
        bits: 16 (float32) or 32 (float64).
        device: where.
    """
    words_per_counter = 128 // bits
    q = -(-n // words_per_counter)
    dtype = torch.float32 if bits == 16 else torch.float64
    out = torch.empty(words_per_counter, q, dtype=dtype, device=device)
    block = _BLOCK if out.device.type == "cpu" else max(q, 1)
    for start in range(0, q, block):
        index = torch.arange(start, min(start + block, q), device=device)
        words = philox4x32((index, tensor, step & _WORD, rank), (seed & _WORD, seed >> 32 & _WORD))
        for i, word in enumerate(words):
            if bits == 16:
                out[2 * i, start : start + block] = word & 0xFFFF
                out[2 * i + 1, start : start + block] = word >> 16
            else:
                out[i, start : start + block] = word
    return out.add_(0.5).mul_(2.0**-bits).view(-1)[:n]


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
    mask = torch.zeros_like(probability, dtype=torch.bool)
    mask[torch.argsort(q, stable=True)[:size]] = True
    return mask
