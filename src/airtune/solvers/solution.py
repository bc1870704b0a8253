"""What every solver returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airtune.errors import InputError

Status = Literal["optimal", "feasible", "infeasible", "stalled"]
"""optimal: certified; feasible: a heuristic's answer; infeasible: none exists; stalled: not converged."""


@dataclass(frozen=True)
class Solution:
    """The answer of a solver.

    Parameters
    ----------
    value : the decision, an array (or a dict of arrays); units in the solver's docstring. NaN where infeasible.
    status : "optimal", "feasible", "infeasible" or "stalled".
    objective : the objective at `value`; infinite where infeasible.
    iterations : of the outermost loop.
    message : one line; for "infeasible" it names the clients.
    """

    value: Any
    status: Status
    objective: float
    iterations: int
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a decision to use."""
        return self.status in ("optimal", "feasible")


def name_clients(mask: ArrayLike, limit: int = 8) -> str:
    """Return "clients 3, 7, 9" for the true entries of a mask [clients], shortened after `limit` of them."""
    indices = np.flatnonzero(np.asarray(mask))
    shown = ", ".join(str(i) for i in indices[:limit])
    more = f" and {indices.size - limit} more" if indices.size > limit else ""
    return f"client{'s' if indices.size != 1 else ''} {shown}{more}"


def finite_array(
    name: str, value: ArrayLike, size: int, *, lowest: float = 0.0, positive: bool = False
) -> NDArray[np.float64]:
    """Return `value` as [size] finite numbers >= `lowest` (> 0 if `positive`), or raise InputError."""
    array = np.broadcast_to(np.asarray(value, dtype=np.float64), (size,))
    bad = ~np.isfinite(array) | (array < lowest) | (positive & (array <= 0.0))
    if bad.any():
        bound = "positive" if positive else f"at least {lowest:g}"
        raise InputError(f"{name}: {name_clients(bad)} must be finite and {bound}; got {array[bad][0]:g}")
    return array


def infeasible(size: int, message: str, iterations: int = 0) -> Solution:
    """Return the solution that says there is none, with a value of NaN [clients]."""
    return Solution(np.full(size, np.nan), "infeasible", float("inf"), iterations, message)
