"""Small-scale fading: a complex coefficient with mean power 1 for each (seed, link, client, block).

A block is one coherence time; inside it the coefficient is constant. Any block can be asked for at any time without
replaying the ones before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import exp1, j0

from airtune.errors import InputError, unknown_name
from airtune.streams import uniform_field
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
Integers = NDArray[np.int64]
Correlation = Literal["gauss-markov", "jakes", "none"]

SPEED_OF_LIGHT = 299_792_458.0
_CHUNK = 16_384  # clients at a time: the work arrays stay in the processor's cache
_FORGOTTEN = 1e-9  # a correlation below this is taken as none
_FROZEN = 1e-12  # 1 - correlation per block below this is taken as a channel that never changes


class Fading(Protocol):
    """A law of small-scale fading."""

    def coefficient(
        self, seed: int, link: str, clients: Integers, first: Integers, count: int, block: float, frequency: float
    ) -> Complex:
        """Return coefficients [clients, count] of blocks first .. first + count - 1; mean power 1.

        Parameters
        ----------
        seed : of the world.
        link : "uplink", "downlink" ...; different links fade independently.
        clients : [clients].
        first : [clients], index of the first block.
        count : number of consecutive blocks.
        block : s.
        frequency : of the carrier, Hz.
        """
        ...

    def mean_log_power(self) -> float:
        """Return E[ln |h|^2]: at high SNR the ergodic rate is the rate at gain times exp of this."""
        ...


@dataclass(frozen=True)
class NoFading:
    """The coefficient is 1."""

    def coefficient(
        self, seed: int, link: str, clients: Integers, first: Integers, count: int, block: float, frequency: float
    ) -> Complex:
        """Return ones; see `Fading`."""
        return np.ones((clients.size, count), dtype=np.complex128)

    def mean_log_power(self) -> float:
        """Return 0."""
        return 0.0


@dataclass(frozen=True)
class Rayleigh:
    """Rayleigh fading: complex normal coefficients, so that power is exponential with mean 1.

    Parameters
    ----------
    speed : of device or surroundings, m/s; the Doppler frequency is speed * carrier / c. 0: never changes.
    correlation : over time, where rho = J0(2 pi Doppler block) is Jakes' coefficient (Clarke's isotropic scattering;
        Jakes, "Microwave Mobile Communications", 1974):
        "gauss-markov": x_{b+1} = rho x_b + sqrt(1 - rho^2) e, correlation rho^|d| over d blocks, exactly, by a bridge
        over a dyadic tree between anchors so far apart (|rho|^d < 1e-9) that they are taken as independent;
        "jakes": correlation J0(2 pi Doppler t), exactly over the ensemble, as a sum of `sinusoids` waves with uniform
        angles of arrival and complex normal amplitudes;
        "none": independent from block to block.
    sinusoids : number of waves of "jakes", at least 32.
    """

    speed: float = quantity("1 m/s", "m/s")
    correlation: Correlation = "gauss-markov"
    sinusoids: int = 32

    def __post_init__(self) -> None:
        _check(self.speed, self.correlation, self.sinusoids)

    def coefficient(
        self, seed: int, link: str, clients: Integers, first: Integers, count: int, block: float, frequency: float
    ) -> Complex:
        """Return complex normal coefficients; see `Fading`."""
        return scattered(self, seed, link, clients, first, count, block, frequency)

    def mean_log_power(self) -> float:
        """Return minus Euler's constant."""
        return -float(np.euler_gamma)


@dataclass(frozen=True)
class Rician:
    """Rician fading: a fixed wave of share K / (K + 1) of the power and a Rayleigh part of the rest.

    Parameters
    ----------
    k_factor : K, linear: power of the fixed wave over power of the scattered ones. 3GPP TR 38.901 table 7.5-6 gives a
        mean of 9 dB for UMa and UMi line of sight, 7 dB for RMa and InH.
    speed, correlation, sinusoids : of the scattered part, as in `Rayleigh`. The fixed wave has a phase drawn once per
        client and no Doppler shift [our choice: the arrival is taken at a right angle to the motion].
    """

    k_factor: float = quantity("9 dB", "1")
    speed: float = quantity("1 m/s", "m/s")
    correlation: Correlation = "gauss-markov"
    sinusoids: int = 32

    def __post_init__(self) -> None:
        _check(self.speed, self.correlation, self.sinusoids)
        if not (math.isfinite(self.k_factor) and self.k_factor >= 0.0):
            raise InputError(f"k_factor: must be at least 0 (linear) and finite; got {self.k_factor:g}")

    def coefficient(
        self, seed: int, link: str, clients: Integers, first: Integers, count: int, block: float, frequency: float
    ) -> Complex:
        """Return fixed wave plus scattered part; see `Fading`."""
        scatter = scattered(self, seed, link, clients, first, count, block, frequency)
        phase = 2.0 * np.pi * uniform_field(seed, f"fading.{link}.fixed-wave", clients)[:, None]
        return (math.sqrt(self.k_factor) * np.exp(1j * phase) + scatter) / math.sqrt(self.k_factor + 1.0)

    def mean_log_power(self) -> float:
        """Return ln(K / (K + 1)) + E1(K) (the logarithmic mean of a non-central chi-square of two degrees)."""
        k = self.k_factor
        if k < 1e-12:
            return -float(np.euler_gamma)
        return math.log(k / (k + 1.0)) + float(exp1(k))


FADINGS: dict[str, type[Fading]] = {"none": NoFading, "rayleigh": Rayleigh, "rician": Rician}


def jakes_coefficient(doppler: float, lag: ArrayLike) -> Array:
    """Return J0(2 pi doppler lag): the correlation of isotropic scattering over `lag` s at `doppler` Hz."""
    return np.asarray(j0(2.0 * np.pi * doppler * np.asarray(lag, dtype=np.float64)))


def scattered(
    law: Rayleigh | Rician,
    seed: int,
    link: str,
    clients: Integers,
    first: Integers,
    count: int,
    block: float,
    frequency: float,
) -> Complex:
    """Return the complex normal part [clients, count] of a fading law; arguments as in `Fading.coefficient`."""
    doppler = law.speed * frequency / SPEED_OF_LIGHT
    purpose = f"fading.{link}"
    if law.correlation == "jakes":

        def part(c: Integers, f: Integers) -> Complex:
            return sum_of_waves(seed, purpose, c, f, count, doppler * block, law.sinusoids)
    else:
        rho = float(jakes_coefficient(doppler, block)) if law.correlation == "gauss-markov" else 0.0

        def part(c: Integers, f: Integers) -> Complex:
            return gauss_markov(seed, purpose, c, f, count, rho)

    return _in_chunks(part, clients, first, max(1, _CHUNK // count))


def gauss_markov(seed: int, purpose: str, clients: Integers, first: Integers, count: int, rho: float) -> Complex:
    """Return a stationary first-order Gauss-Markov sequence [clients, count] with lag-one correlation `rho`.

    The value at a multiple of 2^K is drawn by itself, K the least with |rho|^(2^K) < 1e-9; the value in the middle of
    an interval of 2h follows from its ends by the bridge of the law: mean a (left + right), a = rho^h / (1 + rho^2h),
    variance (1 - rho^2h) / (1 + rho^2h). K bridges lead from the anchors to any index.
    """
    if 1.0 - abs(rho) < _FROZEN:
        return np.repeat(complex_normal(seed, purpose, clients, np.int64(0))[:, None], count, axis=1)
    index = first[:, None] + np.arange(count, dtype=np.int64)
    levels = 0
    while abs(rho) ** (2**levels) >= _FORGOTTEN:
        levels += 1
    span = 2**levels
    left = _tree_values(seed, purpose, clients, index // span, span, 0)
    if levels == 0:
        return left
    right = _tree_values(seed, purpose, clients, index // span + 1, span, 0)
    for level in range(levels):
        half = span >> (level + 1)
        decay = rho**half
        noise = _tree_values(seed, purpose, clients, index // (2 * half), 2 * half, half)
        deviation = math.sqrt((1.0 - decay * decay) / (1.0 + decay * decay))
        middle = decay / (1.0 + decay * decay) * (left + right) + deviation * noise
        upper = index % (2 * half) >= half
        left, right = np.where(upper, middle, left), np.where(upper, right, middle)
    return left


def _tree_values(seed: int, purpose: str, clients: Integers, cell: Integers, width: int, offset: int) -> Complex:
    """Return the complex normal at place cell * width + offset of the tree, [clients, count], each drawn once."""
    lowest = cell[:, :1]
    spread = int((cell[:, -1:] - lowest).max(initial=0)) + 1
    places = (lowest + np.arange(spread, dtype=np.int64)) * width + offset
    values = complex_normal(seed, purpose, clients[:, None], places)
    return values if spread == cell.shape[1] == 1 else np.take_along_axis(values, cell - lowest, axis=1)


def sum_of_waves(
    seed: int, purpose: str, clients: Integers, first: Integers, count: int, cycles: float, waves: int
) -> Complex:
    """Return sum_n g_n exp(2 pi i cycles b cos(angle_n)) / sqrt(waves) for blocks b: [clients, count].

    The amplitudes g_n are complex normal and the angles uniform, so each value is exactly complex normal and the
    correlation over the ensemble exactly J0(2 pi cycles d). (One client's average over time varies with its g_n.)
    """
    wave = np.arange(waves, dtype=np.int64)
    amplitude = complex_normal(seed, purpose + ".wave", clients[:, None], wave)
    angle = 2.0 * np.pi * uniform_field(seed, purpose + ".angle", clients[:, None], wave)
    shift = 2.0j * np.pi * cycles * np.cos(angle)
    index = (first[:, None] + np.arange(count, dtype=np.int64)).astype(np.float64)
    total = np.zeros(index.shape, dtype=np.complex128)
    for n in range(waves):
        total += amplitude[:, n : n + 1] * np.exp(shift[:, n : n + 1] * index)
    return total / math.sqrt(waves)


def complex_normal(seed: int, purpose: str, *where: ArrayLike) -> Complex:
    """Return complex normals of variance 1, one per place (the Box-Muller transform of two uniform fields)."""
    radius = np.sqrt(-np.log(uniform_field(seed, purpose + ".radius", *where)))
    phase = 2.0 * np.pi * uniform_field(seed, purpose + ".phase", *where)
    result = np.empty(radius.shape, dtype=np.complex128)
    result.real = radius * np.cos(phase)
    result.imag = radius * np.sin(phase)
    return result


def _in_chunks(
    part: Callable[[Integers, Integers], Complex], clients: Integers, first: Integers, chunk: int
) -> Complex:
    if clients.size <= chunk:
        return part(clients, first)
    starts = range(0, clients.size, chunk)
    return np.concatenate([part(clients[s : s + chunk], first[s : s + chunk]) for s in starts])


def _check(speed: float, correlation: str, sinusoids: int) -> None:
    if not (math.isfinite(speed) and speed >= 0.0):
        raise InputError(f"speed: must be at least 0 and finite, in m/s; got {speed:g}")
    if correlation not in ("gauss-markov", "jakes", "none"):
        raise unknown_name("correlation", correlation, ("gauss-markov", "jakes", "none"))
    if sinusoids < 32:
        raise InputError(f"sinusoids: must be at least 32; got {sinusoids}")
