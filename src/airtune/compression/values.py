"""How the numbers that a codec has chosen are written: floating point, or integers by unbiased stochastic rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError, NoResultError

Singles = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]

_HALF_MAX = 65504.0


class ValueCoder(Protocol):
    """Writes a flat array of numbers whose length both sides know."""

    def size_bits(self, count: int) -> int:
        """Return the bits of `count` numbers, exactly."""
        ...

    def pack(self, values: Singles, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Return what is sent of the numbers [count]."""
        ...

    def unpack(self, arrays: Arrays, count: int) -> Singles:
        """Return the numbers [count] that the server reads."""
        ...


@dataclass(frozen=True)
class FloatingPoint:
    """Numbers as they are ("fp32"), or rounded to nearest half precision ("fp16")."""

    precision: Literal["fp32", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.precision not in ("fp32", "fp16"):
            raise InputError(f"values.precision: unknown {self.precision!r}; valid: fp32, fp16")

    def size_bits(self, count: int) -> int:
        """Return 32 or 16 bits a number."""
        return count * (32 if self.precision == "fp32" else 16)

    def pack(self, values: Singles, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Return the numbers. Raises NoResultError if one is too large for fp16."""
        if self.precision == "fp32":
            return {"values": values.copy()}
        if bool((np.abs(values) > _HALF_MAX).any()):
            raise NoResultError("compressor: a value exceeds the range of fp16 (65504); use fp32")
        return {"values": values.astype(np.float16)}

    def unpack(self, arrays: Arrays, count: int) -> Singles:
        """Return the numbers in single precision."""
        return arrays["values"].astype(np.float32)


@dataclass(frozen=True)
class Stochastic:
    """Integers of `bits` bits and one fp32 scale per `group` numbers, rounded at random without bias.

    With L = 2^(bits - 1) - 1 and the group's largest magnitude m, x becomes the integer below or above x L / m, the
    upper one with the probability of the fractional part, so that the expectation is x; the error of one number is
    below m / L (QSGD, arXiv 1610.02132, with the maximum norm).

    Parameters
    ----------
    bits : per number, 2 to 8.
    group : numbers that share a scale.
    """

    bits: int = 8
    group: int = 256

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 2 <= self.bits <= 8:
            raise InputError(f"values.bits: {self.bits} is not possible; valid: 2 to 8")
        if self.group < 1:
            raise InputError(f"values.group: {self.group} is not possible; valid: at least 1")

    @property
    def levels(self) -> int:
        """Return L, the largest integer that is sent."""
        return 2 ** (self.bits - 1) - 1

    def size_bits(self, count: int) -> int:
        """Return the bits of packed integers (whole bytes) and scales."""
        return 8 * _bytes_for(count * self.bits) + 32 * self._groups(count)

    def pack(self, values: Singles, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Return integers and scales."""
        grouped = self._grouped(values)
        scale = np.abs(grouped).max(axis=1, initial=0.0).astype(np.float32)
        exact = grouped.astype(np.float64) / np.where(scale > 0.0, scale, 1.0)[:, None] * self.levels
        below = np.floor(exact)
        drawn = below + (rng.random(exact.shape) < exact - below)
        integers = np.clip(drawn, -self.levels, self.levels).astype(np.int64).ravel()[: len(values)]
        return {"values": pack_integers(integers + self.levels, self.bits), "scales": scale}

    def unpack(self, arrays: Arrays, count: int) -> Singles:
        """Return integer times scale over L."""
        integers = unpack_integers(arrays["values"], self.bits, count) - self.levels
        grouped = self._grouped(integers.astype(np.float32))
        return (grouped * (arrays["scales"][:, None] / np.float32(self.levels))).ravel()[:count].astype(np.float32)

    def _groups(self, count: int) -> int:
        return -(-count // self.group)

    def _grouped(self, values: Singles) -> Singles:
        padded = np.zeros(self._groups(len(values)) * self.group, dtype=np.float32)
        padded[: len(values)] = values
        return padded.reshape(-1, self.group)


def pack_integers(values: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Return integers from 0 below 2^width as a string of bits, the most significant first, padded to whole bytes."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.int64)
    return np.packbits(((values[:, None] >> shifts) & 1).astype(np.uint8).ravel())


def unpack_integers(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.int64]:
    """Return the `count` integers that `pack_integers` wrote."""
    digits = np.unpackbits(packed, count=count * width).reshape(count, width).astype(np.int64)
    return digits @ (np.int64(1) << np.arange(width - 1, -1, -1, dtype=np.int64))


def _bytes_for(bits: int) -> int:
    return -(-bits // 8)
