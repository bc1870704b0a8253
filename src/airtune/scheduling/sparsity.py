"""Keep ratios and bandwidth decided together: what each number of components costs a cohort, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from airtune.compression.ratio import is_adjustable, with_keep_ratio
from airtune.lora import AdapterSlice
from airtune.scheduling.work import LocalWork, Slices
from airtune.solvers.drift_plus_penalty import PricedRound, drift_plus_penalty
from airtune.solvers.equal_finish import Uploads, equal_finish
from airtune.solvers.latency_variants import client_queues, fixed_rate_choice
from airtune.solvers.solution import Solution, name_clients
from airtune.solvers.structural_rank import largest_keep_ratio
from airtune.types import ClientTask, Compressor, Floats, Ints, Observation


@dataclass(frozen=True)
class Choices:
    """What a cohort could send; clients in the order of the tasks.

    Attributes
    ----------
    tasks : one per client, without bandwidth. components : [choices], increasing, of `rank`.
    bits : [choices], of every client. compute_seconds, gain, power : [n].
    rates : [n], bit/s on measured networks, where no band is shared, or None.
    noise_density : W/Hz. snr_gap : linear. bandwidth : Hz, free. download_seconds : s, of the common broadcast.
    """

    tasks: Sequence[ClientTask]
    rank: int
    components: Ints
    bits: Floats
    compute_seconds: Floats
    gain: Floats
    power: Floats
    rates: Floats | None
    noise_density: float
    snr_gap: float
    bandwidth: float
    download_seconds: float

    @staticmethod
    def of(tasks: Sequence[ClientTask], rank: int, seen: Observation, gain: Floats) -> Choices:
        """Return the choices of tasks whose codecs can send 1 ... `rank` components; gain : [clients] of the fleet.

        A codec without a keep ratio, or one whose bits do not depend on it, leaves one choice: everything.
        """
        clients = np.array([task.client for task in tasks], dtype=np.int64)
        components, bits = _sizes(tasks[0], rank, seen)
        links = seen.links
        return Choices(
            tasks=tasks,
            rank=rank,
            components=components,
            bits=bits,
            compute_seconds=np.array([seen.costs.compute_seconds(task) for task in tasks]),
            gain=gain[clients],
            power=seen.fleet.transmit_power[clients],
            rates=None if links.fixed_uplink_rate is None else links.fixed_uplink_rate[clients],
            noise_density=links.noise_density,
            snr_gap=links.snr_gap,
            bandwidth=seen.free_bandwidth,
            download_seconds=_download_seconds(tasks, clients, seen),
        )

    def latency(self, choice: int) -> float:
        """Return the least seconds, without download, until all have sent ``bits[choice]``."""
        bits = np.full(len(self.tasks), self.bits[choice])
        if self.rates is not None:
            return float((self.compute_seconds + bits / self.rates).max())
        return self._finish(bits).objective

    @property
    def clients(self) -> Ints:
        """Return the clients, [n]."""
        return np.array([task.client for task in self.tasks], dtype=np.int64)

    def alone(self) -> Floats:
        """Return the seconds [n], without download, that the least choice takes a client alone in the whole band."""
        if self.rates is None:
            return self._uploads(0).finish(self.bandwidth)
        with np.errstate(divide="ignore"):
            return self.compute_seconds + self.bits[0] / self.rates

    def shortfall(self, limit: float) -> str:
        """Return which clients make a round within `limit` (s, without download) impossible, where it is.

        First those that could not meet it with the whole band to themselves; else those that need more than an equal
        share of it.
        """
        late = self.alone() > limit
        if late.any():
            return f"{_named(self.clients[late])} cannot send one component in time even alone in the band"
        wide = self._uploads(0).needed(limit) > self.bandwidth / len(self.tasks)
        return f"one component from everybody does not fit the band; {_named(self.clients[wide])} need most of it"

    def solve(self, errors: Floats, queue: Floats, start: float | None) -> Solution:
        """Return {"choice" [n], "bandwidth" [n] Hz, "latency" s} for weighted errors [n, rank] and the queues.

        queue : s; [1], or [n] for a queue per client.
        """
        table = errors[:, self.components - 1]
        price = float(queue.max(initial=0.0))
        if self.rates is not None:
            seconds = self.compute_seconds[:, None] + self.bits[None, :] / self.rates[:, None]
            found = fixed_rate_choice(seconds, table, price)
            share = np.full(len(self.tasks), self.bandwidth / len(self.tasks))
            return replace(found, value={**found.value, "bandwidth": share}) if found.ok else found
        problem = PricedRound.of(
            self.compute_seconds,
            self.bits,
            self.power,
            self.gain,
            self.noise_density,
            self.bandwidth,
            table,
            price,
            self.snr_gap,
        )
        return client_queues(problem, queue) if len(queue) > 1 else drift_plus_penalty(problem, start)

    def planned(self, choice: Ints, bandwidth: Floats) -> tuple[ClientTask, ...]:
        """Return the tasks with what each sends and its band."""
        codec = self.tasks[0].compressor
        codecs = [_with_components(codec, int(i), self.rank) for i in self.components]
        chosen = zip(self.tasks, choice, bandwidth, strict=True)
        return tuple(replace(task, compressor=codecs[int(j)], bandwidth=float(w)) for task, j, w in chosen)

    def mean_full_latency(self, gains: Floats) -> float:
        """Return the mean over channels [draws, n] of the least seconds, without download, until all sent all."""
        if self.rates is not None:
            return self.latency(len(self.bits) - 1)
        return float(np.mean([replace(self, gain=row).latency(len(self.bits) - 1) for row in gains]))

    def largest_ratio(self, limit: float, gains: Floats) -> float:
        """Return the largest common keep ratio with which the mean round takes at most `limit`, NaN without one.

        limit : s, without download. gains : [draws, n], channels over which the mean is taken; not used where the
        rates are given.
        """
        if self.rates is not None:
            fits = [j for j in range(len(self.bits)) if self.latency(j) <= limit]
            return float(self.components[max(fits)]) / self.rank if fits else float("nan")
        one, full = float(self.bits[0]), float(self.bits[-1])
        several = len(self.bits) > 1
        each = (full - one) / (self.rank - int(self.components[0])) if several else 0.0
        changing = each * self.rank if several else full
        link = (self.power, gains, self.noise_density, self.bandwidth)
        lowest = self.rank if several else 1
        found = largest_keep_ratio(
            self.compute_seconds, changing, full - changing, lowest, *link, limit, self.snr_gap, tolerance=1e-4
        )
        return float(found.value)

    def _uploads(self, choice: int) -> Uploads:
        link = (self.power, self.gain, self.noise_density, self.snr_gap)
        return Uploads.of(self.compute_seconds, self.bits[choice], *link)

    def _finish(self, bits: Floats) -> Solution:
        link = (self.compute_seconds, bits, self.power, self.gain, self.noise_density)
        return equal_finish(*link, self.bandwidth, self.snr_gap)


def choices_by_rank(
    clients: Ints, ranks: Sequence[int], seen: Observation, work: LocalWork, gain: Floats
) -> list[Choices]:
    """Return the choices of a cohort if the adapter had each of some ranks: the first components of every slot."""
    found: list[Choices] = []
    for rank in ranks:
        slices = Slices.same(AdapterSlice.truncation(seen.shape, rank))
        found.append(Choices.of([work.task(int(c), slices, seen) for c in clients], rank, seen, gain))
    return found


def offline_notes(options: Sequence[Choices], limit: float, draws: Floats | None) -> dict[str, Any]:
    """Return what goes on record of the ranks that could be chosen: the share of each that meets the limit (s).

    draws : [draws, clients of the fleet], channels over which latencies are averaged; None: the options' own channel.
    """
    ratios: list[float] = []
    full: list[float] = []
    for option in options:
        gains = option.gain[None, :] if draws is None else draws[:, option.clients]
        ratios.append(option.largest_ratio(limit - option.download_seconds, gains))
        full.append(option.mean_full_latency(gains) + option.download_seconds)
    return {
        "ranks": [option.rank for option in options],
        "keep_ratios": [None if np.isnan(ratio) else ratio for ratio in ratios],
        "full_latency_s": full,
        "channel_draws": 0 if draws is None else len(draws),
    }


def _sizes(task: ClientTask, rank: int, seen: Observation) -> tuple[Ints, Floats]:
    """Return the numbers of components that differ in bits, and those bits."""
    if not is_adjustable(task.compressor):
        bits = task.compressor.bits(task.send, seen.shape)
        return np.array([rank]), np.array([float(bits)])
    counts = np.arange(1, rank + 1)
    bits = np.array(
        [float(_with_components(task.compressor, int(i), rank).bits(task.send, seen.shape)) for i in counts]
    )
    distinct = np.append(np.diff(bits) > 0.0, True)
    return counts[distinct], bits[distinct]


def _with_components(codec: Compressor, count: int, rank: int) -> Compressor:
    return with_keep_ratio(codec, count / rank) if is_adjustable(codec) else codec


def _download_seconds(tasks: Sequence[ClientTask], clients: Ints, seen: Observation) -> float:
    """Return the seconds of a broadcast of what the first client receives, at the worst client's rate."""
    rate = float(seen.links.downlink_rate(clients).min())
    return seen.costs.downlink_bits(tasks[0]) / rate if rate > 0.0 else 0.0


def _named(clients: Ints) -> str:
    mask = np.zeros(int(clients.max()) + 1, dtype=np.bool_)
    mask[clients] = True
    return name_clients(mask)
