"""Rules under which clients train or share one factor only, so that averages of it are exact.

With a common A, ``sum_k p_k B_k A`` is ``B_mean A``: nothing is left out, the rule is one weighted sum of what clients
send, and half the values travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from airtune.aggregation.mean import (
    Absent,
    Mean,
    Weights,
    client_weights,
    mean_extras,
    mean_factors,
    parts_of,
)
from airtune.aggregation.merging import Redraw, column_bits, merged, restarted, row_bits
from airtune.aggregation.stacking import SKETCH_REASON, started
from airtune.aggregation.staleness import arrived, part_of
from airtune.capabilities import Trait
from airtune.errors import InputError, unknown_name
from airtune.lora import NEITHER, ONLY_A, ONLY_B, AdapterShape, Exchange, Factor, LoraFactors, stack
from airtune.streams import torch_seed
from airtune.types import ClientUpdate, RoundOutcome, ServerModel

RANK_REASON = "all clients train one factor against the common other one: nobody may hold fewer of its components"


@dataclass(frozen=True)
class FrozenA:
    """FFA-LoRA's rule (arXiv 2403.12313): A is drawn once and fixed; B is trained, sent and averaged.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    absent : what a client without a slot counts as.
    start : law and seed of A; None: the model's own (Kaiming-uniform, as PEFT draws it).
    """

    weights: Weights = "examples"
    absent: Absent = "excluded"
    start: Redraw | None = None

    @property
    def linear(self) -> bool:
        """Return that the server needs the mean of B only."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {Trait.UNEQUAL_RANKS: RANK_REASON}

    def exchange(self, round_index: int) -> Exchange:
        """Return that only B travels and only B is trained."""
        return Exchange(receive=ONLY_B, train=ONLY_B, send=ONLY_B)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model with the A that stays."""
        return model if self.start is None else started(model, self.start)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return Mean(self.weights, self.absent)(model, outcome)


@dataclass(frozen=True)
class Alternating:
    """RoLoRA's rule (arXiv 2502.01755): B in odd rounds, A in even rounds; the other factor is common and fixed.

    It starts with B: as long as B is zero the gradient of A is zero.

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    absent : what a client without a slot counts as.
    """

    weights: Weights = "examples"
    absent: Absent = "excluded"

    @property
    def linear(self) -> bool:
        """Return that the server needs the mean of one factor only."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {Trait.UNEQUAL_RANKS: RANK_REASON}

    def exchange(self, round_index: int) -> Exchange:
        """Return that both factors are downloaded: a client may have missed the round that changed the fixed one."""
        trained = trained_factor(round_index)
        return Exchange(train=frozenset({trained}), send=frozenset({trained}))

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return Mean(self.weights, self.absent)(model, outcome)


@dataclass(frozen=True)
class SharedFactor:
    """FedSA-LoRA's rule (arXiv 2410.01463): both factors are trained, one is shared; the other stays on its client.

    Parameters
    ----------
    shared : "A" (the paper), or "B" (what Fed-ALoRA argues for, arXiv 2509.25414).
    weights : p_k, "examples" or "uniform".
    absent : what a client without a slot counts as.
    """

    shared: Factor = "A"
    weights: Weights = "examples"
    absent: Absent = "excluded"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.shared not in ("A", "B"):
            raise unknown_name("method.shared", self.shared, ("A", "B"))

    @property
    def linear(self) -> bool:
        """Return that the server needs the mean of one factor only."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {
            Trait.UNEQUAL_RANKS: RANK_REASON,
            Trait.SKETCH: "a client's own factor needs the same components in every round",
        }

    def exchange(self, round_index: int) -> Exchange:
        """Return that both factors are trained and only the shared one travels."""
        travels: frozenset[Factor] = frozenset({self.shared})
        return Exchange(receive=travels, send=travels)

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return Mean(self.weights, self.absent)(model, outcome)


@dataclass(frozen=True)
class SharedCore:
    """Fed-SB's rule (arXiv 2502.15436): ``s B R A`` with A and B fixed; only the small core R is trained and averaged.

    A and B are orthonormal, drawn from a seed, and R starts at zero, so the model starts at the base [choice: the paper
    takes them from the SVD of a first gradient, which is computed on clients' data].

    Parameters
    ----------
    weights : p_k, "examples" or "uniform".
    seed : of A and B.
    """

    weights: Weights = "examples"
    seed: int = 0

    @property
    def linear(self) -> bool:
        """Return that the server needs the mean of the cores only."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what this rule cannot take."""
        return {Trait.UNEQUAL_RANKS: RANK_REASON, Trait.SKETCH: SKETCH_REASON}

    def exchange(self, round_index: int) -> Exchange:
        """Return that neither A nor B is trained or travels: the core goes with every slice."""
        return Exchange(receive=NEITHER, train=NEITHER, send=NEITHER)

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes with a core in every slot."""
        return replace(shape, slots={name: replace(slot, core=True) for name, slot in shape.slots.items()})

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model with orthonormal A and B and a core of zeros.

        Raises
        ------
        InputError : the rank is larger than a layer.
        """
        factors: dict[str, LoraFactors] = {}
        for place, (slot, like) in enumerate(model.adapter.factors.items()):
            if like.rank > min(like.in_features, like.out_features):
                raise InputError(
                    f"model.rank: {like.rank} orthonormal components do not fit slot {slot!r} of size "
                    f"{like.out_features} x {like.in_features}"
                )
            right = Redraw("orthonormal", torch_seed(self.seed, "fixed A")).rows(like, model.version, place)
            left = Redraw("orthonormal", torch_seed(self.seed, "fixed B")).columns(like, model.version, place)
            core = like.A.new_zeros((like.rank, like.rank))
            factors[slot] = LoraFactors(A=right.A, B=left.B, scaling=like.scaling, core=core)
        return replace(model, adapter=model.adapter.with_factors(factors))

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        return Mean(self.weights)(model, outcome)


Side = Literal["A", "B"]


@dataclass(frozen=True)
class MergeAndRedraw:
    """RAC-LoRA's chain (arXiv 2410.08305): train one factor against a drawn one, average, merge, draw anew.

    The drawn factor comes from a seed that all share, the trained one starts at zero: the merge is exact, and only the
    trained factor's mean has to be sent. Clients that hold fewer components use the first rows of the drawn factor;
    theirs are padded with zeros, which is exact too.

    Parameters
    ----------
    drawn : "A": A is drawn and B trained (the paper); "B": the mirrored chain (GaLore with one projector per round).
    weights : p_k, "examples" or "uniform".
    redraw : law and seed of the drawn factor.
    """

    drawn: Side = "A"
    weights: Weights = "examples"
    redraw: Redraw = field(default_factory=lambda: Redraw("orthonormal"))

    def __post_init__(self) -> None:
        """Check the name."""
        if self.drawn not in ("A", "B"):
            raise unknown_name("method.drawn", self.drawn, ("A", "B"))

    @property
    def linear(self) -> bool:
        """Return that the server needs the mean of the trained factor only."""
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
            Trait.SKETCH: SKETCH_REASON,
            Trait.PARTIAL_DEPTH: "padding a slot that a client does not have with zeros would shrink its step",
        }

    def exchange(self, round_index: int) -> Exchange:
        """Return that one factor is trained and sent, and that no adapter is downloaded (only the merges are)."""
        trained = ONLY_B if self.drawn == "A" else ONLY_A
        return Exchange(receive=NEITHER, train=trained, send=trained)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model with the first drawn factor."""
        return started(model, self.redraw, mirrored=self.drawn == "B")

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model."""
        updates = arrived(model, outcome)
        if not updates:
            return model
        weights = client_weights(updates, outcome, self.weights)
        additions = _means(model, updates, weights, outcome)
        factors = restarted(model.adapter, additions, self.redraw, model.version + 1, mirrored=self.drawn == "B")
        adapter = model.adapter.with_factors(factors, mean_extras(model.adapter, updates, weights))
        bits = column_bits(additions) if self.drawn == "A" else row_bits(additions)
        return merged(model, adapter, additions, bits)


def trained_factor(round_index: int) -> Factor:
    """Return the factor that RoLoRA trains in a round: B in odd rounds, A in even ones."""
    return "B" if round_index % 2 else "A"


def _means(
    model: ServerModel, updates: list[ClientUpdate], weights: list[float], outcome: RoundOutcome
) -> dict[str, LoraFactors]:
    """Return the mean product of every slot of which somebody sent a component.

    Fresh updates share the drawn factor: their mean has the adapter's rank, missing components are zeros. A stale one
    was trained against the factor of its own version, which it brings along: it is stacked.
    """
    fresh = [(u, w) for u, w in zip(updates, weights, strict=True) if u.model_version == model.version]
    stale = [(u, w) for u, w in zip(updates, weights, strict=True) if u.model_version != model.version]
    total, means = sum(weights), dict[str, LoraFactors]()
    for slot, current in model.adapter.factors.items():
        parts = [(part_of(u, model, outcome, slot), w / total) for u, w in stale if u.task.send.kept(slot)]
        if any(u.task.send.kept(slot) for u, _ in fresh):
            found = parts_of(slot, [u for u, _ in fresh], [w for _, w in fresh])
            mean = mean_factors(current.at_least_single(), found, "zero")
            parts.insert(0, (mean, sum(w for _, w in fresh) / total))
        if parts:
            means[slot] = stack([part for part, _ in parts], [weight for _, weight in parts])
    return means
