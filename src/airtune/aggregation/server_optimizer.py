"""The server's own optimizer on the change of the adapter: momentum and adaptive steps, with state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from airtune.errors import InputError, unknown_name
from airtune.lora import Adapter, LoraFactors

if TYPE_CHECKING:
    from torch import Tensor

Rule = Literal["momentum", "adam", "yogi", "adagrad"]
RULES: tuple[Rule, ...] = ("momentum", "adam", "yogi", "adagrad")
SecondMoment = Literal["value", "tensor"]
SECOND_MOMENTS: tuple[SecondMoment, ...] = ("value", "tensor")
Moments = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Moment:
    """First and second moment of every tensor of the adapter, by name; empty before the first step.

    A second moment is one value for each value of its tensor, or one for the tensor.
    """

    first: Moments = field(default_factory=dict[str, "Tensor"])
    second: Moments = field(default_factory=dict[str, "Tensor"])


@dataclass(frozen=True)
class ServerStep:
    """One step of the server (Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2).

    With the aggregate's change d of a tensor: ``m = b1 m + (1 - b1) d``; "momentum": ``x += eta m``; the others keep
    ``v`` and do ``x += eta m / (sqrt(v) + tau)``, with v the sum of d^2 (adagrad), its moving mean (adam), or yogi's
    ``v - (1 - b2) d^2 sign(v - d^2)``. As in the paper v starts at tau^2 and nothing is bias-corrected.

    Parameters
    ----------
    rule : "momentum", "adam", "yogi" or "adagrad".
    learning_rate : eta. beta1, beta2 : decay of the moments. adaptivity : tau.
    second_moment : whether every value has its own d^2 ("value", the paper's), or every tensor one, the mean of its d^2
        ("tensor"; ours), which a factored product has too.
    """

    rule: Rule = "adam"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    adaptivity: float = 1e-3
    second_moment: SecondMoment = "value"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.rule not in RULES:
            raise unknown_name("method.rule", self.rule, RULES)
        if self.second_moment not in SECOND_MOMENTS:
            raise unknown_name("method.second_moment", self.second_moment, SECOND_MOMENTS)
        if not (self.learning_rate > 0 and self.adaptivity > 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(
                f"method.learning_rate, method.adaptivity, method.beta1, method.beta2: {self.learning_rate:g}, "
                f"{self.adaptivity:g}, {self.beta1:g}, {self.beta2:g} are not possible; valid: above 0; 0 <= beta < 1"
            )

    def __call__(self, before: Adapter, after: Adapter, moment: Moment) -> tuple[Adapter, Moment]:
        """Return the adapter after a step along the change ``after - before``, and the new moments."""
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}

        def step(name: str, old: Tensor, new: Tensor) -> Tensor:
            change = new.double() - old.double()
            m = moment.first.get(name, change.new_zeros(change.shape))
            first[name] = self.beta1 * m + (1 - self.beta1) * change
            square = change.square()
            second[name] = self.second(
                moment.second.get(name), square if self.second_moment == "value" else square.mean()
            )
            return (old.double() + self.learning_rate * first[name] / self.divisor(second[name])).to(old.dtype)

        return stepped(before, after, step), Moment(first, second)

    def divisor(self, second: Tensor) -> Tensor:
        """Return what the first moment is divided by: ``sqrt(v) + tau``, one for "momentum"."""
        return second.new_ones(()) if self.rule == "momentum" else second.sqrt() + self.adaptivity

    def second(self, earlier: Tensor | None, square: Tensor) -> Tensor:
        """Return the second moment v after a step with these d^2; `earlier` is None before the first."""
        v = square.new_full(square.shape, self.adaptivity**2) if earlier is None else earlier
        if self.rule == "adam":
            return self.beta2 * v + (1 - self.beta2) * square
        if self.rule == "yogi":
            return v - (1 - self.beta2) * square * (v - square).sign()
        return v + square if self.rule == "adagrad" else v


def stepped(before: Adapter, after: Adapter, step: Callable[[str, Tensor, Tensor], Tensor]) -> Adapter:
    """Return the adapter with ``step(name, old, new)`` in place of every tensor; names are unique."""
    factors: dict[str, LoraFactors] = {}
    for slot, old in before.factors.items():
        new = after.factors[slot]
        core = old.core
        if core is not None and new.core is not None:
            core = step(f"core/{slot}", core, new.core)
        a, b = step(f"A/{slot}", old.A, new.A), step(f"B/{slot}", old.B, new.B)
        factors[slot] = replace(old, A=a, B=b, core=core)
    extras = {name: step(f"extra/{name}", tensor, after.extras[name]) for name, tensor in before.extras.items()}
    return before.with_factors(factors, extras)
