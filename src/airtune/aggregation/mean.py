"""Averages of factors: over all clients, over the owners of a component, by sample counts or by Frobenius norms.

Each rule here is linear in every client's factors and averages A and B separately, so the average of the products is
*not* reproduced: sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A), the covariance of the factors over clients.

Sums are taken in double precision in the order of the clients' indices, then cast to the dtype of the server's
adapter: the order in which updates arrived cannot matter, to the bit, and equal updates average to themselves, to the
bit, for adapters in single precision or less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from airtune.capabilities import Trait
from airtune.errors import unknown_name
from airtune.lora import Adapter, Indices, LoraFactors
from airtune.types import ClientUpdate, RoundOutcome, ServerModel

if TYPE_CHECKING:
    from torch import Tensor

Weights = Literal["examples", "uniform"]
Absent = Literal["excluded", "unchanged", "zero"]
Scope = Literal["slot", "model"]

_NO_TRAITS: Mapping[Trait, str] = {}


@dataclass(frozen=True)
class Mean:
    """The weighted mean of A and of B over the clients that arrived, component by component.

    Parameters
    ----------
    weights : "examples": in proportion to the clients' training examples; "uniform": equal.
    absent : what a client that does not hold a component counts as: "excluded" (the mean over the owners; a component
        without owner is unchanged), "unchanged" (the server's own value), or "zero" (padding, as in HetLoRA).
        A factor that a client holds but does not train counts as the server's own value under "unchanged" and "zero".
        A component that nobody sent is unchanged in every case (zero rows of A *and* zero columns of B would never
        train again) [choice].
    extras_weights : weights of the extra tensors (classifier head); None: the same.

    Without updates the model is returned as it is, with the same version.
    """

    weights: Weights = "examples"
    absent: Absent = "excluded"
    extras_weights: Weights | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        _check("weights", self.weights, ("examples", "uniform"))
        _check("absent", self.absent, ("excluded", "unchanged", "zero"))
        _check("extras_weights", self.extras_weights or self.weights, ("examples", "uniform"))

    @property
    def linear(self) -> bool:
        """Return that one weighted sum of what clients send is all it needs."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this mean cannot take."""
        if self.absent != "zero":
            return _NO_TRAITS
        return {Trait.SKETCH: "zeros in place of the components that a sketch left out would shrink the model"}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = in_client_order(outcome.updates)
        if not updates:
            return model
        weights = client_weights(updates, outcome, self.weights)
        extras = client_weights(updates, outcome, self.extras_weights or self.weights)
        by_slot = {name: weights for name in model.adapter.factors}
        return model.updated(mean_adapter(model.adapter, updates, by_slot, extras, self.absent))


@dataclass(frozen=True)
class FrobeniusWeighted:
    """HetLoRA's sparsity-weighted mean (arXiv 2401.06432): weights in proportion to ``||B_k A_k||_F``, zero padding.

    Parameters
    ----------
    scope : "slot": one norm for each slot [choice, default]; "model": one norm over all slots. Both exist in public
        code; the paper does not say.
    extras_weights : weights of the extra tensors (classifier head).

    Where all norms are zero the weights are the sample counts [choice].
    """

    scope: Scope = "slot"
    extras_weights: Weights = "examples"

    def __post_init__(self) -> None:
        """Check the names."""
        _check("scope", self.scope, ("slot", "model"))
        _check("extras_weights", self.extras_weights, ("examples", "uniform"))

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this mean cannot take."""
        return {
            Trait.SKETCH: "zeros in place of the components that a sketch left out would shrink the model",
            Trait.PARTIAL_DEPTH: "a client without a slot has norm zero there: use a mean over owners",
            Trait.FIXED_FACTOR: "the norm of a product says nothing about the one factor that was trained",
        }

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = in_client_order(outcome.updates)
        if not updates:
            return model
        examples = client_weights(updates, outcome, "examples")
        norms = {name: [_norm(update, name) for update in updates] for name in model.adapter.factors}
        if self.scope == "model":
            total = [sum(norms[name][k] ** 2 for name in norms) ** 0.5 for k in range(len(updates))]
            norms = {name: total for name in norms}
        by_slot = {name: values if sum(values) > 0 else examples for name, values in norms.items()}
        extras = client_weights(updates, outcome, self.extras_weights)
        return model.updated(mean_adapter(model.adapter, updates, by_slot, extras, "zero"))


@dataclass(frozen=True)
class IndependentSampling:
    """The unbiased sum under independent sampling: ``x + sum_n (a_n / q_n) (x_n - x)``, without renormalising.

    a_n is the client's share of all examples of the fleet (or 1/N), q_n the probability with which it was in the
    cohort. The expectation over cohorts is the update of the whole fleet. Clients that were drawn and lost count as
    no change, which biases the sum towards the present model.

    Parameters
    ----------
    weights : a_n: "examples" (n_n / sum of all n) or "uniform" (1 / number of clients with examples).
    """

    weights: Weights = "examples"

    def __post_init__(self) -> None:
        """Check the names."""
        _check("weights", self.weights, ("examples", "uniform"))

    @property
    def linear(self) -> bool:
        """Return that one weighted sum is all it needs: a_n / q_n is known before anybody trains."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this sum cannot take."""
        return {Trait.UNKNOWN_PROBABILITY: "a_n / q_n needs the probability with which a client was drawn"}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = in_client_order(outcome.updates)
        if not updates:
            return model
        factors = [_share(outcome, u.task.client, self.weights) / u.task.probability for u in updates]
        return model.updated(add_changes(model.adapter, updates, factors))


# ---------------------------------------------------------------------------------------------------------- primitives


@dataclass(frozen=True)
class Part:
    """One client's share in one slot: its factors in the coordinates of `components`, and its weight.

    absent : whether the client holds nothing of the slot (then `values` is None).
    """

    weight: float
    components: Indices | None = None
    values: LoraFactors | None = None
    tensors: frozenset[str] = field(default_factory=frozenset[str])


def in_client_order(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Return the updates by client, then by start (a client may have an older update kept from an earlier round)."""
    return sorted(updates, key=lambda update: (update.task.client, update.started_at, update.arrival_time))


def client_weights(updates: Sequence[ClientUpdate], outcome: RoundOutcome, weights: Weights) -> list[float]:
    """Return one weight per update, not normalised: training examples, or 1 each."""
    if weights == "uniform":
        return [1.0] * len(updates)
    return [float(outcome.fleet.num_examples[update.task.client]) for update in updates]


def parts_of(slot: str, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> list[Part]:
    """Return each update's part in one slot, in the order given."""
    parts: list[Part] = []
    for update, weight in zip(updates, weights, strict=True):
        send = update.task.send
        if send.kept(slot):
            parts.append(Part(weight, send.components[slot], update.values.factors[slot], frozenset(send.tensors)))
        else:
            parts.append(Part(weight))
    return parts


def mean_adapter(
    adapter: Adapter,
    updates: Sequence[ClientUpdate],
    slot_weights: Mapping[str, Sequence[float]],
    extras_weights: Sequence[float],
    absent: Absent,
) -> Adapter:
    """Return the adapter whose every slot and extra is the weighted mean; weights per slot, not normalised."""
    factors = {
        name: mean_factors(current, parts_of(name, updates, slot_weights[name]), absent)
        for name, current in adapter.factors.items()
    }
    return adapter.with_factors(factors, mean_extras(adapter, updates, extras_weights))


def mean_factors(current: LoraFactors, parts: Sequence[Part], absent: Absent) -> LoraFactors:
    """Return the weighted mean of one slot; `current` is the server's and gives scaling, dtype and absent values."""
    total = sum(part.weight for part in parts)
    a = _Accumulator(current.A, total, absent)
    b = _Accumulator(current.B.T, total, absent)
    for part in parts:
        if part.values is None or part.components is None:
            continue
        a.add(part.components, part.values.A if "A" in part.tensors else None, part.weight)
        b.add(part.components, part.values.B.T if "B" in part.tensors else None, part.weight)
    return LoraFactors(
        A=a.mean(),
        B=b.mean().T.contiguous(),
        scaling=current.scaling,
        core=_mean_core(current, parts, absent),
    )


def mean_extras(adapter: Adapter, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the plain weighted means of the extras over the clients that sent them."""
    means: dict[str, Tensor] = {}
    for name, current in adapter.extras.items():
        sent = [(u.values.extras.get(name), w) for u, w in zip(updates, weights, strict=True) if u.task.send.extras]
        mean = _mean_tensor(current, sent)
        means[name] = current if mean is None else mean
    return means


def add_changes(adapter: Adapter, updates: Sequence[ClientUpdate], factors: Sequence[float]) -> Adapter:
    """Return ``adapter + sum_k factors[k] (update_k - adapter)``: what an update does not hold does not change.

    The factors are used as they are: this is the primitive of every unbiased aggregate.
    """
    changed: dict[str, LoraFactors] = {}
    for name, current in adapter.factors.items():
        parts = parts_of(name, updates, factors)
        a, b = current.A.double().clone(), current.B.double().clone()
        core = None if current.core is None else current.core.double().clone()
        for part in parts:
            if part.values is None or part.components is None:
                continue
            i = part.components
            if "A" in part.tensors:
                a[i] += part.weight * (part.values.A.double() - current.A[i].double())
            if "B" in part.tensors:
                b[:, i] += part.weight * (part.values.B.double() - current.B[:, i].double())
            if core is not None and part.values.core is not None and current.core is not None:
                square = (i[:, None], i[None, :])
                core[square] += part.weight * (part.values.core.double() - current.core[square].double())
        changed[name] = LoraFactors(
            A=a.to(current.A.dtype),
            B=b.to(current.B.dtype),
            scaling=current.scaling,
            core=None if core is None or current.core is None else core.to(current.core.dtype),
        )
    extras: dict[str, Tensor] = {}
    for name, current_extra in adapter.extras.items():
        value = current_extra.double().clone()
        for update, factor in zip(updates, factors, strict=True):
            if update.task.send.extras and name in update.values.extras:
                value += factor * (update.values.extras[name].double() - current_extra.double())
        extras[name] = value.to(current_extra.dtype)
    return adapter.with_factors(changed, extras)


class _Accumulator:
    """The weighted mean of rows [rank, width] of which each client holds some."""

    def __init__(self, current: Tensor, total: float, absent: Absent) -> None:
        self.current = current
        self.total = total
        self.absent = absent
        self.sum = current.new_zeros(current.shape).double()
        self.own = current.new_zeros(current.shape[0]).double()  # weight of those that sent a row
        self.held = current.new_zeros(current.shape[0]).double()  # weight of those that hold it untrained

    def add(self, components: Indices, rows: Tensor | None, weight: float) -> None:
        if rows is None:
            self.held[components] += weight
            return
        self.sum[components] += weight * rows.double()
        self.own[components] += weight

    def mean(self) -> Tensor:
        current, owned = self.current.double(), self.own > 0.0
        if self.absent == "excluded":
            value, weight = self.sum, self.own
        elif self.absent == "unchanged":
            value = self.sum + (self.total - self.own)[:, None] * current
            weight = self.own * 0.0 + self.total
        else:
            value = self.sum + self.held[:, None] * current
            weight = self.own * 0.0 + self.total
        mean = value / weight.where(owned, weight * 0.0 + 1.0)[:, None]
        return mean.to(self.current.dtype).where(owned[:, None], self.current)


def _mean_core(current: LoraFactors, parts: Sequence[Part], absent: Absent) -> Tensor | None:
    """Return the mean of the cores entry by entry (an entry is owned by who holds both its components)."""
    if current.core is None:
        return None
    total = current.core.new_zeros(current.core.shape).double()
    weight = total.clone()
    everything = sum(part.weight for part in parts)
    for part in parts:
        if part.values is None or part.values.core is None or part.components is None:
            continue
        square = (part.components[:, None], part.components[None, :])
        total[square] += part.weight * part.values.core.double()
        weight[square] += part.weight
    owned = weight > 0.0
    if absent == "unchanged":
        rest = (everything - weight).clamp_min(0.0)
        total, weight = total + rest * current.core.double(), weight + rest
    elif absent == "zero":
        weight = weight * 0.0 + everything
    mean = total / weight.where(weight > 0.0, weight * 0.0 + 1.0)
    return mean.to(current.core.dtype).where(owned, current.core)


def _mean_tensor(current: Tensor | None, parts: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """Return the weighted mean of whole tensors; `current` if nobody sent one."""
    if current is None:
        return None
    sent = [(tensor, weight) for tensor, weight in parts if tensor is not None]
    weight = sum(w for _, w in sent)
    if not weight > 0.0:
        return current
    total = current.new_zeros(current.shape).double()
    for tensor, w in sent:
        total += w * tensor.double()
    return (total / weight).to(current.dtype)


def _share(outcome: RoundOutcome, client: int, weights: Weights) -> float:
    """Return the client's share in the whole fleet: of the examples, or one over the clients that have any."""
    if weights == "examples":
        return float(outcome.fleet.data_weight[client])
    return 1.0 / max(int((outcome.fleet.num_examples > 0).sum()), 1)


def _norm(update: ClientUpdate, slot: str) -> float:
    """Return ``||B_k A_k||_F`` of one client's slot with its scaling, 0 if it holds none of it."""
    return update.values.factors[slot].frobenius_norm() if update.task.send.kept(slot) else 0.0


def _check(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown_name(f"method.{name}", value, valid)
