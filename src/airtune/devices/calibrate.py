"""Measure how fast this machine trains, and write it down as a device profile.

The host's clock comes in as an argument (`now`), as do the training step and its FLOPs, so nothing here knows torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from airtune.errors import InputError

_MATRIX = 1024


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes
    ----------
    flops_per_second : counted FLOPs of a training step over its median seconds.
    peak_flops_per_second : of a single-precision matrix product of numpy, the best of the repeats.
    seconds : median of one step, s.
    spread : (largest - smallest) / median of the steps.
    """

    flops_per_second: float
    peak_flops_per_second: float
    seconds: float
    spread: float

    @property
    def utilisation(self) -> float:
        """Share of the peak that training reached; at most 1 (a step may beat numpy's matrix product)."""
        return min(1.0, self.flops_per_second / self.peak_flops_per_second)


def measure(
    step: Callable[[], object], flops: float, now: Callable[[], float], repeats: int = 5, warmup: int = 1
) -> Calibration:
    """Time a training step.

    Parameters
    ----------
    step : does one training step, to its end.
    flops : of that step, as counted by `airtune.devices.latency.training_flops`.
    now : the host's clock, s.
    repeats, warmup : timed steps, and steps before them that are not timed.
    """
    if not flops > 0.0:
        raise InputError(f"flops: must be positive; got {flops:g}")
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats: must be at least 1 and warmup at least 0; got {repeats} and {warmup}")
    for _ in range(warmup):
        step()
    seconds = [_timed(step, now) for _ in range(repeats)]
    middle = float(np.median(seconds))
    if not middle > 0.0:
        raise InputError("repeats: the clock did not advance during a step; use a larger step")
    spread = (max(seconds) - min(seconds)) / middle
    return Calibration(flops / middle, measure_peak(now, repeats), middle, spread)


def measure_peak(now: Callable[[], float], repeats: int = 5) -> float:
    """Return the FLOP/s of a 1024 x 1024 single-precision matrix product, the best of the repeats."""
    left = np.linspace(0.0, 1.0, _MATRIX * _MATRIX, dtype=np.float32).reshape(_MATRIX, _MATRIX)
    out = np.empty_like(left)
    _ = np.matmul(left, left, out=out)
    seconds = [_timed(lambda: np.matmul(left, left, out=out), now) for _ in range(max(repeats, 3))]
    fastest = [s for s in seconds if s > 0.0]
    if not fastest:
        raise InputError("now: the clock did not advance during a matrix product")
    return 2.0 * _MATRIX**3 / min(fastest)


def write_profile(
    path: Path, name: str, found: Calibration, *, memory_bytes: float, power: float, title: str = ""
) -> None:
    """Write a profile that `airtune.devices.profiles.load_profile` reads; atomic.

    Parameters
    ----------
    path : ends in ``.toml``.
    name : of the profile: small letters, digits and dashes.
    memory_bytes : B of the machine.
    power : W that it draws while training (not measured here; the caller knows or assumes it).
    """
    if not name or name != name.lower() or not name.replace("-", "").isalnum():
        raise InputError(f"name: {name!r} is no profile name; valid: small letters, digits and dashes")
    if path.suffix != ".toml":
        raise InputError(f"{path}: must end in .toml")
    if not (memory_bytes > 0.0 and power > 0.0):
        raise InputError(f"memory_bytes, power: must be positive; got {memory_bytes:g} and {power:g}")
    peak = max(found.peak_flops_per_second, found.flops_per_second)
    text = _TEMPLATE.format(
        name=name,
        title=(title or name).replace("\\", "").replace('"', "'").replace("\n", " "),
        peak=peak,
        utilisation=found.flops_per_second / peak,
        memory=memory_bytes,
        power=power,
        spread=100.0 * found.spread,
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _timed(work: Callable[[], object], now: Callable[[], float]) -> float:
    begin = now()
    work()
    return now() - begin


_TEMPLATE = """\
# Written by airtune calibrate. Steps spread by {spread:.0f} % of their median.

[sources]
measured = "measured on this machine by airtune calibrate"
given = "given to airtune calibrate, not measured"
power-class = "3GPP TS 38.101-1 table 6.2.1-1, UE power class 3 (23 dBm)"
lte-model = "M. Lauridsen et al., An Empirical LTE Smartphone Power Model, Intel Technology Journal 18(1), 2014"

[{name}]
title = "{title}"
peak = {{ value = {peak:.6g}, unit = "FLOP/s", source = "measured" }}
utilisation = {{ value = {utilisation:.6g}, unit = "1", source = "measured" }}
memory = {{ value = {memory:.6g}, unit = "B", source = "given" }}
transmit_power = {{ value = 23, unit = "dBm", source = "power-class" }}
receive_power = {{ value = 0.9, unit = "W", source = "lte-model" }}

[[{name}.modes]]
name = "full"
speed = {{ value = 1.0, unit = "1", source = "measured" }}
power = {{ value = {power:.6g}, unit = "W", source = "given" }}
"""
