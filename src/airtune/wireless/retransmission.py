"""Packets that are lost and sent again: a transfer takes longer, or fails; both are told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from airtune.errors import InputError
from airtune.streams import uniform_field
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Place = tuple[Integers, Integers]

_EXACT = 64  # up to so many packets the attempts are drawn one by one


@dataclass(frozen=True)
class Transfer:
    """What became of transfers; arrays [n].

    Attributes
    ----------
    seconds : s until the last packet is acknowledged, or until the transfer is given up; infinite where the link
        carries nothing.
    delivered : whether all bits arrived.
    bits_on_air : sent, repetitions included: what costs energy.
    """

    seconds: Array
    delivered: NDArray[np.bool_]
    bits_on_air: Array


@dataclass(frozen=True)
class Attempts:
    """How transfers fare packet by packet; arrays [n].

    Attributes
    ----------
    bits_on_air : sent, repetitions included.
    waiting : s spent on waiting for the news that a packet was lost.
    delivered : whether every packet passed within its attempts.
    """

    bits_on_air: Array
    waiting: Array
    delivered: NDArray[np.bool_]


@dataclass(frozen=True)
class Retransmission:
    """Automatic repeat request with a fixed packet error rate.

    Each attempt at a packet fails independently with `error_probability`; after `attempts` failures in a row the
    transfer is given up (the task is lost, with reason). Link adaptation of LTE and NR aims at an error rate of 10 %
    of the first attempt (3GPP TS 36.213 clause 7.2.3).

    Parameters
    ----------
    packet_bits : bits of a packet.
    error_probability : of one attempt, in [0, 1).
    attempts : at most, per packet.
    feedback : s of waiting that each lost attempt costs.
    """

    packet_bits: float = quantity("1500 B", "bit")
    error_probability: float = 0.1
    attempts: int = 8
    feedback: float = quantity("8 ms", "s")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.packet_bits) and self.packet_bits >= 1.0):
            raise InputError(f"retransmission.packet_bits: must be at least 1; got {self.packet_bits:g}")
        if not 0.0 <= self.error_probability < 1.0:
            raise InputError(
                f"retransmission.error_probability: must be from 0 to below 1; got {self.error_probability:g}"
            )
        if self.attempts < 1:
            raise InputError(f"retransmission.attempts: must be at least 1; got {self.attempts}")
        if not 0.0 <= self.feedback < math.inf:
            raise InputError(f"retransmission.feedback: must be at least 0, in s; got {self.feedback:g}")

    def attempts_for(self, seed: int, link: str, clients: Integers, start: Array, bits: Array) -> Attempts:
        """Return how transfers fare: a function of (seed, link, client, start time).

        Parameters
        ----------
        link : "uplink" or "downlink".
        clients : [n]. start : [n], s. bits : [n].
        """
        place = clients, np.rint(start * 1e6).astype(np.int64)
        packets = np.ceil(bits / self.packet_bits)
        done = np.minimum(packets, self._before_failure(seed, link, place))
        delivered = done >= packets
        tries = self._tries(seed, link, place, done.astype(np.int64))
        share = np.divide(bits, packets, out=np.zeros(clients.shape), where=packets > 0.0)  # packets of equal size
        given_up = np.where(delivered, 0.0, self.attempts)
        return Attempts(share * (tries + given_up), self.feedback * (tries - done + given_up), delivered)

    def _before_failure(self, seed: int, link: str, place: Place) -> Array:
        """Return how many packets [n] pass before the first one that fails for good: geometric, infinite if none."""
        failure = self.error_probability**self.attempts
        if failure <= 0.0:
            return np.full(place[0].shape, np.inf)
        u = uniform_field(seed, f"retransmission.{link}.failure", *place)
        return np.floor(np.log(u) / math.log1p(-failure))

    def _tries(self, seed: int, link: str, place: Place, packets: Integers) -> Array:
        """Return the attempts [n] that `packets` delivered packets took.

        Each takes a geometric number, cut off at `attempts`. Up to 64 packets are drawn one by one, more by the normal
        law with the exact mean and variance.
        """
        p, most = self.error_probability, self.attempts
        if p == 0.0:
            return packets.astype(np.float64)
        each = np.arange(1, most + 1)
        law = p ** (each - 1.0)
        law = law / law.sum()
        mean = float((law * each).sum())
        variance = float((law * each**2).sum()) - mean**2
        u = uniform_field(seed, f"retransmission.{link}.many", *place)
        many = np.clip(np.rint(packets * mean + np.sqrt(packets * variance) * ndtri(u)), packets, packets * most)
        few = np.flatnonzero(packets <= _EXACT)
        numbers = np.arange(_EXACT)
        draws = uniform_field(seed, f"retransmission.{link}.each", place[0][few, None], place[1][few, None], numbers)
        tries = 1.0 + (draws[..., None] > np.cumsum(law)[:-1]).sum(axis=-1)
        many[few] = (tries * (numbers < packets[few, None])).sum(axis=-1)
        return many
