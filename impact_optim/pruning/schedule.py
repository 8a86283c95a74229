"""How much is gone by when."""

from __future__ import annotations

from collections.abc import Mapping


def ramp(final: float, *, start: int, end: int) -> dict[int, float]:
    r"""A schedule that cuts after every epoch from ``start`` + 1 to ``end``, most while there is most to spare.

    :math:`s(t) = s_f \big(1 - (1 - \tfrac{t - t_0}{t_1 - t_0})^3\big)`.

    Args:
        final: :math:`s_f`, the fraction removed in the end, in (0, 1).
        start, end: :math:`t_0 < t_1`, epochs; at ``start`` nothing is cut yet.

    Source: Zhu & Gupta, To prune, or not to prune, 2017.

    Example:
        >>> ramp(0.5, start=0, end=4)
        {1: 0.2890625, 2: 0.4375, 3: 0.4921875, 4: 0.5}
    """
    if not (0 <= start < end and 0 < final < 1):
        raise ValueError(f"ramp({final}, start={start}, end={end}): it needs 0 < final < 1 and 0 <= start < end")
    return {epoch: final * (1 - (1 - (epoch - start) / (end - start)) ** 3) for epoch in range(start + 1, end + 1)}


def schedule_of(remove: float | Mapping[int, float], by: int | None = None) -> dict[int, float]:
    """Epoch -> fraction removed by then, in the order of epochs; see :class:`ActivationPruner`."""
    if not isinstance(remove, Mapping):
        if isinstance(remove, bool) or not isinstance(remove, int | float) or not 0 < remove < 1:
            raise ValueError(
                f"remove is {remove!r}; it must be the fraction to be removed, in (0, 1), or a schedule such as "
                "{10: 0.2, 20: 0.4}"
            )
        if type(by) is not int or by < 1:
            raise ValueError(
                f"remove={remove}, by={by!r}: say after which epoch, counted from 1, so much is gone, as in "
                f"remove={remove}, by=14"
            )
        return ramp(remove, start=round(by / 7), end=by)
    if by is not None:
        raise ValueError(f"remove is a schedule, which says by itself when: leave out by={by!r}")
    before = 0.0
    for epoch, fraction in sorted(remove.items()):
        if type(epoch) is not int or epoch < 1 or not before <= fraction < 1 or fraction <= 0:
            raise ValueError(
                f"remove is {dict(remove)}; a schedule maps epochs, counted from 1, to the fraction removed by then, "
                "in (0, 1) and never falling"
            )
        before = fraction
    return dict(sorted(remove.items()))
