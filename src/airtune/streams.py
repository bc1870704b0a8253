"""Every random draw of the product: streams that are pure functions of where they are used.

Nothing in airtune stores a generator. A draw is addressed by the experiment's seed, the purpose of the draw and the
place it belongs to (round, client, time block ...). So the order of execution cannot change a result, a resumed run
needs no generator state, and two methods that are compared with one seed meet the same world.

Two forms: `stream` gives a numpy `Generator` for one place; `uniform_field` gives one number for *each* of many
places at once (a million clients in one vectorised call), by hashing the place instead of seeding a generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator of one place.

    Parameters
    ----------
    seed : the experiment's seed.
    purpose : what is drawn, for example ``"cohort"``; different purposes never share numbers.
    where : the place, for example round and client, non-negative integers.
    """
    entropy = [int(seed) & 0xFFFFFFFFFFFFFFFF, _purpose_key(purpose), *(int(w) for w in where)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def torch_seed(seed: int, purpose: str, *where: int) -> int:
    """Return a 63-bit seed for a generator of another library (torch), addressed like `stream`."""
    return int(stream(seed, purpose, *where).integers(0, 2**63 - 1))


def uniform_field(seed: int, purpose: str, *where: ArrayLike) -> NDArray[np.float64]:
    """Return independent uniforms in (0, 1), one for each place; the places are broadcast against one another.

    Parameters
    ----------
    seed : the experiment's seed.
    purpose : what is drawn.
    where : integer arrays or integers, for example ``clients[:, None], blocks[None, :]``.

    Returns
    -------
    array of the broadcast shape. Entry [i, j] depends on its own place only, never on what else is asked.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(np.uint64(int(seed) & 0xFFFFFFFFFFFFFFFF)) + np.uint64(_purpose_key(purpose)))
        for part in where:
            state = _mix(state ^ _mix(np.asarray(part).astype(np.int64).astype(np.uint64) + _GOLDEN))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Advance splitmix64 once: a bijection on 64 bits whose output passes the usual statistical tests."""
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
