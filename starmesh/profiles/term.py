"""Numbers that remember the formula they come from, so that a profile's text cannot say another than its number.

Owns the arithmetic and its notation. Knows nothing of hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class _Binding(IntEnum):
    """How tightly a formula holds together: what stands in a product is put in parentheses unless it does."""

    SUM = 0
    PRODUCT = 1
    ATOM = 2


@dataclass(frozen=True, slots=True)
class Term:
    """``value``, and ``text``, which says how it was computed. Made by ``given`` and by arithmetic."""

    value: float
    text: str
    binding: _Binding = _Binding.ATOM

    @property
    def is_given(self) -> bool:
        """Whether it comes from no formula."""
        return self.binding is _Binding.ATOM

    def __add__(self, other: Term) -> Term:
        return Term(self.value + other.value, f"{self.text} + {other.text}", _Binding.SUM)

    def __sub__(self, other: Term) -> Term:
        return Term(self.value - other.value, f"{self.text} - {other._in(_Binding.PRODUCT)}", _Binding.SUM)

    def __mul__(self, other: Term) -> Term:
        text = f"{self._in(_Binding.PRODUCT)} x {other._in(_Binding.PRODUCT)}"
        return Term(self.value * other.value, text, _Binding.PRODUCT)

    def __truediv__(self, other: Term) -> Term:
        text = f"{self._in(_Binding.PRODUCT)} / {other._in(_Binding.ATOM)}"
        return Term(self.value / other.value, text, _Binding.PRODUCT)

    def _in(self, binding: _Binding) -> str:
        return self.text if self.binding >= binding else f"({self.text})"


def given(value: float, what: str) -> Term:
    """A number that is looked up, counted or assumed; ``what`` is its unit and source, as in "B/s of HBM"."""
    return Term(value, f"{value:.6g} {what}")
