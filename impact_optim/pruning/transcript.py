"""What a cut must leave of a program: its operators, their numbers and constants, and sizes that count no units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .labels import Mismatch, Value, core

Recipe = tuple[str, int]
"""What tells a constant from others: how it is known, and a hash."""


class Step(NamedTuple):
    """An operator of the program, and what of it a cut leaves as it is."""

    name: str
    numbers: list[Any]
    """That enter the arithmetic."""
    results: list[Any]
    """When traced: what it computes from activations. Later: the sizes, ``None`` where units are counted."""
    recipes: list[Recipe | None]
    """Of the constants that it takes."""


class Transcript:
    """The steps of a program, compared with those that it had when the model was traced.

    Args:
        expected: these; without them nothing is compared.
    """

    def __init__(self, expected: Sequence[Step] | None = None) -> None:
        self.steps: list[Step] = []
        self._expected = expected
        self._step = Step("", [], [], [])

    def begin(self, name: str, given: Sequence[Value], numbers: list[Any]) -> bool:
        """Notes an operator and its numbers.

        Returns:
            Whether it makes a constant. Those are compared where activations meet them: code may keep them for later,
            so that not every program computes them.

        Raises:
            Mismatch: it is not the one that was there before.
        """
        constants = [value for value in given if value.constant]
        self._step = Step(name, numbers, [], [value.recipe for value in constants])
        if len(constants) == len(given) or name in CREATED:
            return True
        if name == "contiguous":  # which torch leaves out where a tensor is, as that of a single head
            return False
        self.steps.append(self._step)
        self._compare(given)
        return False

    def enters(self, value: Value, sizes: Sequence[int]) -> None:
        """Notes sizes that enter the arithmetic of the current operator."""
        self._step.numbers.extend(sizes)
        if self._is_noted():
            self._compare([value])

    def result(self, value: Value, given: Sequence[Value], where: str) -> None:
        """Notes a result of the current operator. What is the same number throughout has no sizes to compare."""
        if not self._is_noted():
            return
        results = self._step.results
        results.append(None if value.uniform else value)
        if self._expected is None or value.uniform:
            return
        before = self._expected[len(self.steps) - 1].results
        sizes = before[len(results) - 1] if len(results) <= len(before) else None
        if sizes is not None and (
            len(sizes) != len(value.shape)
            or any(size not in (None, now) for size, now in zip(sizes, value.shape, strict=True))
        ):
            raise _differing(given, f"{where} gives a tensor of the shape {value.shape}, {tuple(sizes)} before")

    def recipe(self, given: Sequence[Value], position: int) -> Recipe | None:
        """What tells the constant that the current operator makes from others."""
        recipes = [value.recipe for value in given if value.constant]
        if self._step.name in ("lift_fresh_copy", "detach", "clone", "alias") and recipes:
            return recipes[0]
        kinds = {None if recipe is None else recipe[0] for recipe in recipes}
        if None in kinds:
            return None
        kind = "computed from contents" if kinds - {"computed"} else "computed"
        return kind, hash((repr(self._step[:2]), *recipes, position))

    def end(self) -> None:
        """After all programs: none of the expected steps may be missing."""
        if self._expected is not None and len(self.steps) < len(self._expected):
            raise _differing([], _OTHER_PROGRAM)

    def _is_noted(self) -> bool:
        return bool(self.steps) and self._step is self.steps[-1]

    def _compare(self, given: Sequence[Value]) -> None:
        if self._expected is None:
            return
        position, now = len(self.steps) - 1, self._step
        before = self._expected[position] if position < len(self._expected) else None
        if (
            before is None
            or before.name != now.name
            or before.numbers[: len(now.numbers)] != now.numbers
            or len(before.recipes) != len(now.recipes)
            or any(map(_is_another, before.recipes, now.recipes))
        ):
            raise _differing(given, _OTHER_PROGRAM)


def recipe_of(constant: Any) -> Recipe | None:
    """What tells a constant of the program from others, if it is small."""
    small = isinstance(constant, Tensor) and constant.numel() <= 64
    return ("contents", hash(repr(constant.tolist()))) if small else None


def _is_another(first: Recipe | None, second: Recipe | None) -> bool:
    """Whether two constants are known to differ."""
    return first is not None and second is not None and first[0] == second[0] and first != second


def _differing(given: Sequence[Value], reason: str) -> Mismatch:
    labels = [core(labels).reshape(-1) for value in given for labels in value.labels]
    units = torch.cat(labels).unique() if labels else torch.empty(0, dtype=torch.int64)
    return Mismatch(units[units >= 0], reason)


CREATED = {
    "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "rand", "rand_like", "randn", "randn_like", "scalar_tensor",
}  # fmt: skip
"""Operators whose results are the same number throughout, or as good as that: they have no size of their own."""
_OTHER_PROGRAM = "the program's constants or operators depend on the number of units"
