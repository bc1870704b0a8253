"""Rules that keep the leading singular directions of the stacked products in the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from airtune.aggregation.algebra import random_rows
from airtune.aggregation.contributions import contributions
from airtune.aggregation.mean import Absent, Weights, client_weights, mean_adapter, mean_extras
from airtune.aggregation.merging import Redraw, factor_bits, merged
from airtune.aggregation.stacking import SKETCH_REASON, check_energy, started
from airtune.aggregation.staleness import arrived, part_of
from airtune.capabilities import Trait
from airtune.errors import InputError
from airtune.lora import ONLY_B, Exchange, LoraFactors, is_half, stack
from airtune.streams import torch_seed
from airtune.types import ClientUpdate, RoundOutcome, ServerModel


@dataclass(frozen=True)
class Truncation:
    """FlexLoRA's rule (arXiv 2402.11505): the best approximation of ``sum_k p_k s_k B_k A_k`` at the adapter's rank.

    The components come out ordered by singular value, so that the first r of them, which a client of rank r downloads,
    are the best approximation of rank r. What lies beyond the adapter's rank is lost.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    absent : what a client without a slot counts as; see `airtune.aggregation.contributions`.
    balanced : singular values as square roots in both factors; else in B, and A has orthonormal rows (the paper).
    seed : of the rows of A beyond the rank of the sum (their columns of B are zero) [choice].
    """

    weights: Weights = "examples"
    absent: Absent = "excluded"
    balanced: bool = False
    seed: int = 0

    @property
    def redraws(self) -> bool:
        """Return that the adapter's basis changes every round."""
        return True

    @property
    def weakens_products(self) -> bool:
        """Return that stale changes are weakened here, as products."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {Trait.SKETCH: SKETCH_REASON}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = arrived(model, outcome)
        if not updates:
            return model
        found = contributions(model, updates, outcome, self.weights, self.absent)
        factors = dict(model.adapter.factors)
        for place, (slot, like) in enumerate(model.adapter.factors.items()):
            if slot in found:
                head = found[slot].stacked().with_scaling(like.scaling).truncate(like.rank, balanced=self.balanced)
                factors[slot] = filled(head, like, torch_seed(self.seed, "filled", model.version + 1, place))
        extras = mean_extras(model.adapter, updates, client_weights(updates, outcome, self.weights))
        return model.updated(model.adapter.with_factors(factors, extras))


@dataclass(frozen=True)
class PrincipalSplit:
    """FedMomentum's rule (arXiv 2603.08014): leading directions stay in the adapter, the others are merged.

    The leading r singular directions of ``sum_k p_k s_k B_k A_k``, split evenly over both factors, are the next
    adapter; those that follow, up to a share of the energy, go into the base. Exact at energy 1: what an adapter in
    half precision rounds away is merged, too.

    Parameters
    ----------
    energy : share of the energy that adapter and merge hold together, above 0 and at most 1.
    weights, absent, seed : as in `Truncation`.
    """

    energy: float = 0.9999
    weights: Weights = "examples"
    absent: Absent = "excluded"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the share."""
        check_energy(self.energy)

    @property
    def redraws(self) -> bool:
        """Return that the adapter's basis changes every round."""
        return True

    @property
    def weakens_products(self) -> bool:
        """Return that stale changes are weakened here, as products."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {Trait.SKETCH: SKETCH_REASON}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = arrived(model, outcome)
        if not updates:
            return model
        found = contributions(model, updates, outcome, self.weights, self.absent)
        factors, additions = dict(model.adapter.factors), dict[str, LoraFactors]()
        for place, (slot, like) in enumerate(model.adapter.factors.items()):
            if slot in found:
                stacked = found[slot].stacked().with_scaling(like.scaling)
                head, rest = stacked.split(like.rank, self.energy, balanced=True)
                factors[slot] = filled(head, like, torch_seed(self.seed, "filled", model.version + 1, place))
                additions[slot] = _with_rounding(rest, head, factors[slot])
        extras = mean_extras(model.adapter, updates, client_weights(updates, outcome, self.weights))
        adapter = model.adapter.with_factors(factors, extras)
        return merged(model, adapter, additions, factor_bits(additions))


@dataclass(frozen=True)
class Refactoring:
    """FedSVD's rule (arXiv 2505.12805): only B is trained and averaged; then ``B A`` is refactored by its SVD.

    ``B_mean A = U S V'`` becomes ``A = V'`` (orthonormal rows) and ``B = U S``: the product is the same, the basis is
    new. The rows of the new A span rows of the old one, so that A never leaves the row space that it was drawn in.
    Where B is still zero nothing is refactored [choice].

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    period : rounds from one refactoring to the next.
    start : law and seed of the first A; None: the model's own.
    """

    weights: Weights = "examples"
    period: int = 1
    start: Redraw | None = None

    def __post_init__(self) -> None:
        """Check the period."""
        if self.period < 1:
            raise InputError(f"method.period: {self.period} is no number of rounds; valid: 1 or more")

    @property
    def linear(self) -> bool:
        """Return that the server needs the mean of B only; refactoring comes after it."""
        return True

    @property
    def redraws(self) -> bool:
        """Return that the adapter's basis changes every round."""
        return True

    @property
    def weakens_products(self) -> bool:
        """Return that stale changes are weakened here, as products."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {
            Trait.UNEQUAL_RANKS: "all clients train B against one common A: nobody may hold fewer of its rows",
            Trait.SKETCH: SKETCH_REASON,
        }

    def exchange(self, round_index: int) -> Exchange:
        """Return that B is trained and uploaded; A is downloaded with it, as it changes."""
        return Exchange(train=ONLY_B, send=ONLY_B)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model with the first A."""
        if self.start is None:
            return model
        return started(model, self.start)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = arrived(model, outcome)
        if not updates:
            return model
        weights = client_weights(updates, outcome, self.weights)
        updates = [u if u.model_version == model.version else rebased(u, model, outcome) for u in updates]
        adapter = mean_adapter(model.adapter, updates, {s: weights for s in model.adapter.factors}, weights, "excluded")
        if (model.version + 1) % self.period == 0:
            adapter = adapter.with_factors({slot: _refactored(f) for slot, f in adapter.factors.items()})
        return model.updated(adapter)


def rebased(update: ClientUpdate, model: ServerModel, outcome: RoundOutcome) -> ClientUpdate:
    """Return a stale update with B expressed against the present A: the same product if both A span one row space.

    Its product is the client's own, or the weakened one (`airtune.aggregation.staleness.part_of`).
    """
    import torch

    factors: dict[str, LoraFactors] = {}
    for slot, values in update.values.factors.items():
        a = model.adapter.factors[slot].A[update.task.send.components[slot]]
        inverse = torch.linalg.pinv(a.double())
        part = part_of(update, model, outcome, slot)
        b = part.cast(torch.float64).times(inverse) / values.scaling
        factors[slot] = replace(values, A=a, B=b.to(values.B))
    return replace(update, values=update.values.with_factors(factors))


def _with_rounding(rest: LoraFactors, head: LoraFactors, stored: LoraFactors) -> LoraFactors:
    """Return what is merged beside a head: the rest, and what half precision rounded away of the head."""
    return stack([rest, head, stored], [1.0, 1.0, -1.0]) if is_half(stored.A) else rest


def _refactored(factors: LoraFactors) -> LoraFactors:
    return filled(factors.truncate(factors.rank), factors, seed=0) if bool(factors.B.any()) else factors


def filled(head: LoraFactors, like: LoraFactors, seed: int) -> LoraFactors:
    """Return `head` in the dtype and the rank of `like`: missing components get random rows and zero columns."""
    head = head.cast(like.A.dtype)
    missing = like.rank - head.rank
    return head.grow(like.rank, random_rows(missing, like.in_features, seed)) if missing > 0 else head
