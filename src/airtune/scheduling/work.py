"""What one client is asked to do, before the radio is shared: three slices and how to train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from airtune.lora import AdapterShape, AdapterSlice, Exchange
from airtune.types import ClientTask, Compressor, Ints, LocalTraining, Observation


@dataclass(frozen=True)
class Slices:
    """What a client downloads (`receive`), gives gradients to (`train`) and uploads (`send`)."""

    receive: AdapterSlice
    train: AdapterSlice
    send: AdapterSlice

    @staticmethod
    def same(part: AdapterSlice) -> Slices:
        """Return the slices of a client that receives, trains and sends the same."""
        return Slices(part, part, part)


@dataclass(frozen=True)
class LocalWork:
    """How every client of a method trains, how its upload is coded, and which factors it exchanges."""

    training: LocalTraining
    compressor: Compressor
    exchange: Exchange = field(default_factory=Exchange)

    def task(self, client: int, slices: Slices, seen: Observation, probability: float = 1.0) -> ClientTask:
        """Return the task of one client at full transmit power, without bandwidth yet."""
        receive, train, send = self.exchange.narrow(slices.receive, slices.train, slices.send)
        return ClientTask(
            client=int(client),
            receive=receive,
            train=train,
            send=send,
            training=self.training,
            compressor=self.compressor,
            bandwidth=0.0,
            transmit_power=float(seen.fleet.transmit_power[client]),
            probability=float(probability),
        )

    def memory_bytes(self, slices: Slices, seen: Observation, client: int = 0) -> float:
        """Return the bytes that one client needs to train these slices (longer texts need more)."""
        return seen.costs.memory_bytes(self.task(client, slices, seen))

    def that_fit(self, options: Sequence[Slices], seen: Observation, clients: Ints) -> Ints:
        """Return how many of the options fit each client's memory, [clients].

        The options must need more and more memory: most clients can hold the last one, for the others we bisect.
        """
        return np.array([self._fitting(options, seen, int(client)) for client in clients], dtype=np.int64)

    def _fitting(self, options: Sequence[Slices], seen: Observation, client: int) -> int:
        room = float(seen.fleet.memory_bytes[client])
        low, high = 0, len(options)  # the first `low` fit; those from `high` on do not
        probe = high
        while low < high:
            if self.memory_bytes(options[probe - 1], seen, client) <= room:
                low = probe
            else:
                high = probe - 1
            probe = (low + high + 1) // 2
        return low

    def with_training(self, **changes: object) -> LocalWork:
        """Return work that trains with other values of some fields of `LocalTraining`."""
        return replace(self, training=replace(self.training, **changes))  # pyright: ignore[reportArgumentType]


@runtime_checkable
class ChoosesRanks(Protocol):
    """A method (or planner) that wants the global adapter to have other ranks than ``[model].rank`` everywhere."""

    def ranks(self, shape: AdapterShape) -> Mapping[str, int]:
        """Return slot -> rank of the global adapter, given its shape at ``[model].rank``."""
        ...


def candidates(seen: Observation) -> Ints:
    """Return the clients that may be chosen, increasing: idle, with examples and with a link to the base station."""
    links, idle = seen.links, np.asarray(seen.idle, dtype=np.int64)
    link = links.uplink_gain if links.fixed_uplink_rate is None else links.fixed_uplink_rate
    return idle[(seen.fleet.num_examples[idle] > 0) & (link[idle] > 0.0)]
