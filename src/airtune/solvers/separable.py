"""Share one band to minimise a sum of costs that each fall, convexly, in a client's own bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from airtune.solvers.solution import Solution, infeasible, name_clients

Array = NDArray[np.float64]

_ITERATIONS = 200
_SLACK = 1e-9  # relative; a deadline taken from another solution is met up to rounding


@dataclass(frozen=True)
class SeparableBand:
    """The problem: min sum_n cost_n(w_n) subject to sum_n w_n <= total, lower_n <= w_n <= upper_n.

    Parameters
    ----------
    cost : [clients] Hz -> [clients], convex and decreasing in each entry.
    slope : [clients] Hz -> [clients], -dcost/dw, positive and decreasing in each entry.
    for_slope : a price > 0 -> [clients] Hz, the bandwidth at which the slope equals the price, without bounds.
    lower, upper : [clients], Hz; upper may be infinite.
    total : Hz.
    """

    cost: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    for_slope: Callable[[float], Array]
    lower: Array
    upper: Array
    total: float

    def solve(self, resource_block: float | None = None) -> Solution:
        """Return the optimum, value [clients] in Hz.

        By the Karush-Kuhn-Tucker conditions there is a price with slope_n(w_n) = price wherever a client is off its
        bounds, >= at its upper and <= at its lower bound; the price is a root in one dimension. In whole resource
        blocks, giving block after block to whoever gains most is optimal (costs are convex).
        """
        problem = self._infeasible()
        if problem is not None:
            return infeasible(self.lower.size, problem)
        if resource_block is not None:
            return self._whole_blocks(resource_block)
        if self.lower.sum() >= self.total:  # by less than the tolerance of `_infeasible`
            return self._answer(self.lower * (self.total / self.lower.sum()), 0, "every client has its minimum")
        if (self.lower > self.upper).any():
            return replace(self, lower=np.minimum(self.lower, self.upper)).solve()
        if self.upper.sum() <= self.total:
            return self._answer(self.upper, 0, "every client has its maximum")
        price, iterations = self._price()
        bandwidth = np.clip(self.for_slope(price), self.lower, self.upper)
        return self._answer(self._fill(bandwidth), iterations)

    def _infeasible(self) -> str | None:
        blocked = ~np.isfinite(self.lower) | (self.lower > self.upper * (1.0 + _SLACK))
        if blocked.any():
            return f"{name_clients(blocked)}: cannot meet the deadline even with the largest bandwidth allowed"
        if self.lower.sum() > self.total * (1.0 + _SLACK):
            most = self.lower > self.total / self.lower.size
            return f"the least bandwidths add up to more than {self.total:g} Hz; {name_clients(most)} need most"
        return None

    def _answer(self, bandwidth: Array, iterations: int, message: str = "") -> Solution:
        return Solution(bandwidth, "optimal", float(self.cost(bandwidth).sum()), iterations, message)

    def _fill(self, bandwidth: Array) -> Array:
        """Spread what rounding left of the band over the clients that are off their bounds."""
        free = (bandwidth > self.lower) & (bandwidth < self.upper)
        share = free * bandwidth
        if share.sum() <= 0.0:
            return bandwidth
        adjusted = bandwidth + share / share.sum() * (self.total - bandwidth.sum())
        return np.clip(adjusted, self.lower, self.upper)

    def _price(self) -> tuple[float, int]:
        """Return the price at which demand equals the band: secant steps on log demand over log price, in a bracket."""
        start = float(np.median(self.slope(np.maximum(self.lower, self.total / self.lower.size))))
        low = high = start if np.isfinite(start) and start > 0.0 else 1.0
        f_low = f_high = self._excess(low)
        iterations = 0
        while f_low < 0.0 and iterations < _ITERATIONS:
            low, iterations = low / 16.0, iterations + 1
            f_low = self._excess(low)
        while f_high > 0.0 and iterations < _ITERATIONS:
            high, iterations = high * 16.0, iterations + 1
            f_high = self._excess(high)
        while high / low > 1.0 + 4e-16 and iterations < _ITERATIONS:
            iterations += 1
            middle = self._step(low, high, f_low, f_high, iterations)
            value = self._excess(middle)
            if abs(value) < 1e-15:
                return middle, iterations
            if value > 0.0:
                low, f_low = middle, value
            else:
                high, f_high = middle, value
        return high, iterations

    def _step(self, low: float, high: float, f_low: float, f_high: float, iteration: int) -> float:
        """Return a price inside the bracket: by secant twice, by bisection the third time."""
        a, b = np.log(low), np.log(high)
        if iteration % 3 == 0 or not np.isfinite(f_low) or f_low == f_high:
            return float(np.exp(0.5 * (a + b)))
        guess = a + (b - a) * f_low / (f_low - f_high)
        margin = 1e-2 * (b - a)
        return float(np.exp(np.clip(guess, a + margin, b - margin)))

    def _excess(self, price: float) -> float:
        return float(np.log(np.clip(self.for_slope(price), self.lower, self.upper).sum() / self.total))

    def _whole_blocks(self, block: float) -> Solution:
        available = int(np.floor(self.total / block * (1.0 + 1e-12)))
        most = np.floor(np.minimum(self.upper, self.total) / block * (1.0 + 1e-12))
        count = np.ceil(self.lower / block * (1.0 - 1e-12))
        gains = np.isfinite(self.cost(np.full(count.shape, block)))  # those to whom bandwidth is of use
        count = np.maximum(count, gains & (self.slope(np.full(count.shape, block)) > 0.0))
        if (count > most).any():
            return infeasible(count.size, f"{name_clients(count > most)}: the maximum bandwidth is too small")
        if count.sum() > available:
            message = f"{count.sum():g} resource blocks needed at least, {available} in the band"
            return infeasible(count.size, f"{message}; {name_clients(count > 0)}")
        spare = available - int(count.sum())
        for _ in range(spare):
            gain = np.where(count < most, self.cost(count * block) - self.cost((count + 1.0) * block), -np.inf)
            best = int(np.argmax(gain))
            if not gain[best] > 0.0:
                break
            count[best] += 1.0
        return self._answer(count * block, spare, f"{count.sum():g} blocks")
