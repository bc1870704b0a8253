"""Stacked products merged into the base: all of them (FLoRA), or the leading singular directions (FLoRIST)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from airtune.aggregation.contributions import contributions
from airtune.aggregation.mean import Absent, Weights, client_weights, mean_extras
from airtune.aggregation.merging import Redraw, factor_bits, merged, restarted
from airtune.aggregation.staleness import arrived
from airtune.capabilities import Trait
from airtune.errors import InputError
from airtune.lora import NEITHER, Exchange, LoraFactors
from airtune.types import RoundOutcome, ServerModel

SKETCH_REASON = (
    "the product of a random subset is a noisy picture of the whole: a rule on products would replace the model by it"
)


@dataclass(frozen=True)
class Stacking:
    """FLoRA's rule (arXiv 2409.05976): the stack of all clients' factors is merged, and a new adapter is drawn.

    The model becomes exactly ``W + sum_k p_k s_k B_k A_k``, for any mix of ranks and scalings. Clients download the
    stacked factors (the dense update where that is less) and draw the next A from the seed, B is zero.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    absent : what a client without a slot counts as; see `airtune.aggregation.contributions`.
    redraw : law and seed of the new adapters.
    """

    weights: Weights = "examples"
    absent: Absent = "excluded"
    redraw: Redraw = field(default_factory=Redraw)

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

    def exchange(self, round_index: int) -> Exchange:
        """Return that the adapter is not downloaded: A comes from the seed and B is zero."""
        return Exchange(receive=NEITHER)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model with a first adapter that every client can draw."""
        return started(model, self.redraw)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return merge_stack(model, outcome, self.weights, self.absent, self.redraw, energy=None)


@dataclass(frozen=True)
class EnergyThreshold:
    """FLoRIST's rule: of the stack, the fewest singular directions that hold a share of its energy are merged.

    Per slot, the smallest p with ``sum_{i<=p} sigma_i^2 >= energy * sum_i sigma_i^2``; the rest is lost. With energy 1
    it is FLoRA's rule with a smaller download.

    Parameters
    ----------
    energy : share kept, above 0 and at most 1.
    weights, absent, redraw : as in `Stacking`.
    """

    energy: float = 0.9
    weights: Weights = "examples"
    absent: Absent = "excluded"
    redraw: Redraw = field(default_factory=Redraw)

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

    def exchange(self, round_index: int) -> Exchange:
        """Return that the adapter is not downloaded: A comes from the seed and B is zero."""
        return Exchange(receive=NEITHER)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model with a first adapter that every client can draw."""
        return started(model, self.redraw)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return merge_stack(model, outcome, self.weights, self.absent, self.redraw, self.energy)


def merge_stack(
    model: ServerModel,
    outcome: RoundOutcome,
    weights: Weights,
    absent: Absent,
    redraw: Redraw,
    energy: float | None,
) -> ServerModel:
    """Return the model with the weighted stack of all products merged, or the share `energy` of it."""
    updates = arrived(model, outcome)
    if not updates:
        return model
    found = contributions(model, updates, outcome, weights, absent)
    additions: dict[str, LoraFactors] = {slot: part.stacked() for slot, part in found.items()}
    if energy is not None:
        additions = {slot: stacked.split(0, energy)[1] for slot, stacked in additions.items()}
    factors = restarted(model.adapter, additions, redraw, model.version + 1)
    extras = mean_extras(model.adapter, updates, client_weights(updates, outcome, weights))
    return merged(model, model.adapter.with_factors(factors, extras), additions, factor_bits(additions))


def started(model: ServerModel, redraw: Redraw, *, mirrored: bool = False) -> ServerModel:
    """Return the model before round 1 with an adapter drawn from the seed, so that nobody has to download it."""
    factors = restarted(model.adapter, model.adapter.factors, redraw, model.version, mirrored=mirrored)
    return replace(model, adapter=model.adapter.with_factors(factors))


def check_energy(energy: float) -> None:
    """Raise InputError unless a share of energy is above 0 and at most 1."""
    if not 0.0 < energy <= 1.0:
        raise InputError(f"method.energy: {energy:g} is no share of the energy; valid: above 0, at most 1")
