"""Energy that a device's owner pays: computing, sending, receiving."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def compute_energy(flops: ArrayLike, energy_per_flop: ArrayLike) -> Array:
    """Return J [clients] for `flops` FLOPs at `energy_per_flop` J/FLOP."""
    return np.asarray(flops, dtype=np.float64) * np.asarray(energy_per_flop, dtype=np.float64)


def switching_energy(cycles: ArrayLike, frequency: ArrayLike, capacitance: ArrayLike) -> Array:
    """Return J [clients] of a CMOS processor: kappa f^2 per cycle (Burd and Brodersen 1996).

    Parameters
    ----------
    cycles : of the clock.
    frequency : f, Hz.
    capacitance : kappa, the effective switched capacitance, J s^2 (often 1e-28 for a phone's processor).
    """
    return np.asarray(capacitance) * np.asarray(cycles, dtype=np.float64) * np.asarray(frequency) ** 2


def transmit_energy(
    power: ArrayLike, seconds: ArrayLike, amplifier_efficiency: ArrayLike = 1.0, circuit_power: ArrayLike = 0.0
) -> Array:
    """Return J [clients] of sending: (radiated power / efficiency + circuit power) times seconds.

    Parameters
    ----------
    power : radiated, W.
    seconds : s on the air.
    amplifier_efficiency : in (0, 1]; the default 1 counts radiated energy only, as most papers do.
    circuit_power : W while sending.
    """
    drawn = np.asarray(power, dtype=np.float64) / np.asarray(amplifier_efficiency) + np.asarray(circuit_power)
    return drawn * np.asarray(seconds, dtype=np.float64)


def receive_energy(receive_power: ArrayLike, seconds: ArrayLike) -> Array:
    """Return J [clients] of receiving for `seconds` s at `receive_power` W."""
    return np.asarray(receive_power, dtype=np.float64) * np.asarray(seconds, dtype=np.float64)
