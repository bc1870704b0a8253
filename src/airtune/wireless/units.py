"""Converters at the edges: decibels, decibel-milliwatts and quantities with a unit, to SI numbers and back.

Everything inside airtune is SI (W, Hz, s, m, bit, B, J, linear power ratios). Decibels and "10 MHz" exist only in
configuration files, data files and printed text, and pass through the functions of this file.
"""

from __future__ import annotations

import math
import re
from dataclasses import field
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12}
_BINARY_PREFIXES = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_NUMBER = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S.*?)?\s*")


@overload
def db_to_linear(decibel: float) -> float: ...
@overload
def db_to_linear(decibel: NDArray[np.float64]) -> NDArray[np.float64]: ...
def db_to_linear(decibel: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
    """Return the power ratio of a value in dB: 10^(x / 10)."""
    return 10.0 ** (decibel / 10.0)


def linear_to_db(ratio: ArrayLike) -> NDArray[np.float64]:
    """Return a power ratio in dB; a ratio of 0 is -inf."""
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(np.asarray(ratio, dtype=np.float64))


@overload
def dbm_to_watt(power: float) -> float: ...
@overload
def dbm_to_watt(power: NDArray[np.float64]) -> NDArray[np.float64]: ...
def dbm_to_watt(power: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
    """Return W for dBm (or W/Hz for dBm/Hz)."""
    return 10.0 ** ((power - 30.0) / 10.0)


def watt_to_dbm(power: ArrayLike) -> NDArray[np.float64]:
    """Return dBm for W (or dBm/Hz for W/Hz)."""
    return linear_to_db(power) + 30.0


def bits_to_bytes(bits: float) -> float:
    """Return bytes of 8 bits."""
    return bits / 8.0


def bytes_to_bits(num_bytes: float) -> float:
    """Return bits of bytes."""
    return num_bytes * 8.0


def _prefixed(symbol: str, prefixes: str = " k M G") -> dict[str, float]:
    table = {"" if p == " " else p: _PREFIXES["" if p == " " else p] for p in [" ", *prefixes.split()]}
    return {prefix + symbol: factor for prefix, factor in table.items()}


_TIME = {"s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BIT = {**_prefixed("bit", "k M G T"), **_prefixed("b", "k M G T")}
_BYTE = {**_prefixed("B", "k M G T"), **{prefix + "B": factor for prefix, factor in _BINARY_PREFIXES.items()}}
_FLOP = _prefixed("FLOP", "k M G T")
_LINEAR_UNITS: dict[str, dict[str, float]] = {
    "Hz": _prefixed("Hz"),
    "W": _prefixed("W", "k m u"),
    "W/Hz": {"W/Hz": 1.0, "mW/Hz": 1e-3},
    "s": _TIME,
    "m": {"m": 1.0, "km": 1e3, "cm": 1e-2, "mm": 1e-3},
    "m/s": {"m/s": 1.0, "km/h": 1 / 3.6},
    "B": _BYTE,
    "B/s": {unit + "/s": factor for unit, factor in _BYTE.items()},
    "bit": {**_BIT, **{unit: 8.0 * factor for unit, factor in _BYTE.items()}},
    "bit/s": {
        **{unit + "/s": factor for unit, factor in _BIT.items()},
        **{unit.removesuffix("bit") + "bps": factor for unit, factor in _BIT.items() if unit.endswith("bit")},
        **{unit + "/s": 8.0 * factor for unit, factor in _BYTE.items()},
    },
    "J": {**_prefixed("J", "k M m u"), "Wh": 3600.0, "kWh": 3.6e6, "mWh": 3.6},
    "J/FLOP": {"J/FLOP": 1.0, "nJ/FLOP": 1e-9, "pJ/FLOP": 1e-12},
    "FLOP": _FLOP,
    "FLOP/s": {
        **{unit + "/s": factor for unit, factor in _FLOP.items()},
        **{unit + "S": factor for unit, factor in _FLOP.items()},
    },
    "K": {"K": 1.0},
    "1": {"": 1.0, "%": 0.01},
}
_LOGARITHMIC_UNITS: dict[str, dict[str, float]] = {  # unit -> the decibel value of one SI unit
    "W": {"dBm": 30.0, "dBW": 0.0},
    "W/Hz": {"dBm/Hz": 30.0, "dBW/Hz": 0.0},
    "1": {"dB": 0.0, "dBi": 0.0},
}


def valid_units(unit: str) -> tuple[str, ...]:
    """Return the units that `parse_quantity` accepts where SI unit `unit` is wanted."""
    if unit not in _LINEAR_UNITS:
        raise ValueError(f"no such SI unit {unit!r}; known: {', '.join(_LINEAR_UNITS)}")
    return (*(name for name in _LINEAR_UNITS[unit] if name), *_LOGARITHMIC_UNITS.get(unit, ()))


def parse_quantity(value: str | float, unit: str, field_name: str = "quantity") -> float:
    """Return a quantity as an SI number.

    Parameters
    ----------
    value : a number, already in SI, or text such as ``"10 MHz"``, ``"23 dBm"``, ``"-174 dBm/Hz"``, ``"5 min"``,
        ``"8 GB"``, ``"3 Mbit/s"``. Text without a unit is read as SI. ``"inf"`` is infinity.
    unit : the SI unit wanted: one of Hz, W, W/Hz, s, m, m/s, B, B/s, bit, bit/s, J, J/FLOP, FLOP, FLOP/s, K, or
        ``"1"`` for a ratio (which may be given in dB or %).
    field_name : named in the error.

    Raises
    ------
    InputError : not a number, not a known unit (the valid ones are listed), or not a number at all (NaN).
    """
    accepted = valid_units(unit)
    problem = (
        f"{field_name}: cannot read {value!r}; valid: a number in {unit!r} or with a unit of {', '.join(accepted)}"
    )
    if isinstance(value, bool):
        raise InputError(problem)
    if isinstance(value, int | float):
        return _not_nan(float(value), problem)
    if value.strip() in ("inf", "infinity"):
        return math.inf
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise InputError(problem)
    number, suffix = float(match[1].replace("_", "")), match[2] or ""
    if suffix in _LOGARITHMIC_UNITS.get(unit, {}):
        return db_to_linear(number - _LOGARITHMIC_UNITS[unit][suffix])
    if suffix == "":
        return number
    if suffix not in _LINEAR_UNITS[unit]:
        raise InputError(problem)
    return number * _LINEAR_UNITS[unit][suffix]


def quantity(default: str | float, unit: str) -> Any:
    """Return a dataclass field with an SI default; its metadata ``unit`` lets a configuration be read with units.

    A configuration reader that meets text for such a field calls ``parse_quantity(text, metadata["unit"])``.
    """
    return field(default=parse_quantity(default, unit), metadata={"unit": unit})


def _not_nan(number: float, problem: str) -> float:
    if math.isnan(number):
        raise InputError(problem)
    return number
