"""The priced round under other constraints: links of fixed rates, and one queue per client.

The problem is that of `airtune.solvers.drift_plus_penalty`. Where the rates are given (measured networks) the band is
no variable, and sorting the finish times solves it. Where every client has a latency limit of its own the sum of
latencies is weighed instead of the longest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from airtune.solvers.airtime import min_latency_sum
from airtune.solvers.drift_plus_penalty import PricedRound
from airtune.solvers.equal_finish import Uploads
from airtune.solvers.solution import Solution, finite_array, name_clients


def fixed_rate_choice(seconds: ArrayLike, errors: ArrayLike, queue: float) -> Solution:
    """Solve the problem where no band is shared (measured networks): exact, by sorting the finish times.

    Parameters
    ----------
    seconds : [clients, choices], finish time of each choice, increasing along the choices.
    errors : [clients, choices], weighted errors, falling. queue : price of a second.

    Returns
    -------
    Solution with value {"choice" [clients], "latency" s}.
    """
    times, table = np.asarray(seconds, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    endless = ~np.isfinite(times[:, 0])
    if endless.any():
        return Solution({}, "infeasible", float("inf"), 0, f"{name_clients(endless)}: no rate")
    least = float(times[:, 0].max(initial=0.0))
    order = np.argsort(times[:, 1:].ravel(), kind="stable")
    ends = np.maximum(times[:, 1:].ravel()[order], least)
    gains = -np.diff(table, axis=1).ravel()[order]
    objective = table[:, 0].sum() + queue * least
    value = np.concatenate([[objective], objective - np.cumsum(gains) + queue * (ends - least)])
    value[~np.isfinite(value)] = np.inf
    latency = float(np.concatenate([[least], ends])[int(np.argmin(value))])
    choice = (times[:, 1:] <= latency).sum(axis=1).astype(np.int64)
    return Solution({"choice": choice, "latency": latency}, "optimal", float(value.min()), 1)


def client_queues(problem: PricedRound, queues: ArrayLike, rounds: int = 8) -> Solution:
    """Solve the variant with one latency constraint, and one queue, per client.

    ::

        min over w, j of sum_k [ V p_k e_k(j_k) + Q_k (compute_k + bits(j_k) / R_k(w_k)) ]   subject to sum_k w_k <= W

    by alternating two exact steps from the equal split: the choice at fixed rates (each client by itself), and the
    convex split at fixed choices (`min_latency_sum`). Each step lowers the objective; the result is a point from which
    neither can, not certainly the optimum. It is the sum of latencies that is weighed, not the longest one.

    Parameters
    ----------
    problem : as for `drift_plus_penalty`; its own queue is not used.
    queues : Q_k [clients], at least 0. A client whose queue is empty still needs band: it counts with 1e-3 of the mean
        queue (1e-3 if all are empty) in the split [choice].
    """
    p = problem
    price = finite_array("queues", queues, p.compute_seconds.size)
    weight = np.maximum(price, 1e-3 * (float(price.mean()) or 1.0))
    uploads = Uploads.of(p.compute_seconds, p.bits[-1], p.power, p.gain, p.noise_density, p.snr_gap)
    width = np.full(uploads.size, p.total_bandwidth / uploads.size)
    choice = np.full(uploads.size, -1, dtype=np.int64)
    split, count = Solution(width, "feasible", 0.0, 0), 0
    for _ in range(rounds):
        count += 1
        with np.errstate(divide="ignore"):
            per_bit = weight / uploads.rate(width)
        new = np.argmin(p.errors + per_bit[:, None] * p.bits[None, :], axis=1).astype(np.int64)
        new = np.where(price > 0.0, new, p.bits.size - 1)
        if np.array_equal(new, choice):
            break
        choice = new
        link = (p.compute_seconds, p.bits[choice], p.power, p.gain, p.noise_density, p.total_bandwidth)
        split = min_latency_sum(*link, weight, p.snr_gap)
        if not split.ok:
            return Solution(p.nothing_sent(), "infeasible", float("inf"), count, split.message)
        width = np.asarray(split.value)
    seconds = p.compute_seconds + p.bits[choice] / uploads.rate(width)
    value = {"choice": choice, "bandwidth": width, "latency": float(seconds.max()), "seconds": seconds}
    return Solution(value, "feasible", p.error(choice) + float((price * seconds).sum()), count, "alternating steps")
