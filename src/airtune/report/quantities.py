"""Numbers as a reader wants them: one unit for a whole column or axis, three significant digits.

The stored files are SI; kbit, kJ and hours exist only here, at the edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A unit to show SI values in: ``shown = value / factor``."""

    name: str
    factor: float

    def show(self, value: float) -> str:
        """Return the value with its unit, for example ``"1,640 s"``."""
        return f"{digits(value / self.factor)} {self.name}".strip()


def digits(value: float) -> str:
    """Return a number with about three significant digits and thousands separators, never in scientific notation."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    if abs(round(value, decimals)) >= 10 ** (3 - decimals):
        decimals = max(0, decimals - 1)
    return f"{value:,.{min(decimals, 9)}f}"


def time_unit(values: Iterable[float]) -> Unit:
    """Return s below 20,000 s and ms below 0.1 s, else h or days, by the largest value."""
    return _choose(values, (("ms", 1e-3, 0.1), ("s", 1.0, 2e4), ("h", 3600.0, 1.8e6), ("days", 86400.0, math.inf)))


def bit_unit(values: Iterable[float]) -> Unit:
    """Return bit, kbit, Mbit, Gbit or Tbit (decimal prefixes) by the largest value."""
    return _choose(values, _prefixed("bit"))


def energy_unit(values: Iterable[float]) -> Unit:
    """Return mJ, J, kJ or MJ by the largest value."""
    return _choose(values, (("mJ", 1e-3, 1.0), *_prefixed("J")))


def frequency_unit(values: Iterable[float]) -> Unit:
    """Return Hz, kHz, MHz or GHz by the largest value."""
    return _choose(values, _prefixed("Hz"))


def rate_unit(values: Iterable[float]) -> Unit:
    """Return bit/s, kbit/s, Mbit/s or Gbit/s by the largest value."""
    return _choose(values, _prefixed("bit/s"))


def flops_unit(values: Iterable[float]) -> Unit:
    """Return FLOP/s, ..., TFLOP/s by the largest value."""
    return _choose(values, _prefixed("FLOP/s"))


def metric_text(metric: str, value: float | None) -> str:
    """Return an accuracy as a percentage and a loss with three decimals; None is a dash."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"


def counted(number: int, noun: str) -> str:
    """Return ``"1 seed"`` or ``"3 seeds"``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def decibel(gain: float) -> float:
    """Return ``10 log10(gain)`` of a positive power gain."""
    return 10.0 * math.log10(gain)


def _prefixed(name: str) -> tuple[tuple[str, float, float], ...]:
    steps = (("", 1.0, 1e3), ("k", 1e3, 1e6), ("M", 1e6, 1e9), ("G", 1e9, 1e12), ("T", 1e12, math.inf))
    return tuple((prefix + name, factor, limit) for prefix, factor, limit in steps)


def _choose(values: Iterable[float], ladder: tuple[tuple[str, float, float], ...]) -> Unit:
    """Return the first unit whose limit lies above the largest absolute value; without values or for 0, factor 1."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    for name, factor, limit in ladder:
        if largest < limit and (largest > 0 or factor == 1.0):
            return Unit(name, factor)
    return Unit(ladder[-1][0], ladder[-1][1])
