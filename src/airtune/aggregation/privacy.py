"""Differential privacy of clients: clipped changes, one sum, Gaussian noise; and what it costs in epsilon.

The guarantee hides whether one client took part at all. It holds for what leaves the server (the model), with a server
that is trusted to clip and to add noise. Everything that a wrapped rule does with the noisy mean comes after it and
costs nothing. It needs a rule that asks the clients for one sum: `airtune.aggregation.declaring.is_linear`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from airtune.aggregation.changes import change_of, consensus
from airtune.aggregation.declaring import DeclaringAggregator, is_linear
from airtune.aggregation.mean import IndependentSampling, Mean, in_client_order
from airtune.aggregation.robust import SAME_SLICE, Wrapper, check_comparable, clip
from airtune.capabilities import Trait
from airtune.errors import InputError
from airtune.streams import torch_seed
from airtune.types import RoundOutcome, ServerModel


@dataclass(frozen=True)
class ClientPrivacy(Wrapper):
    """Central client-level differential privacy (DP-FedAvg with a fixed denominator, arXiv 1710.06963).

    ``change = (sum_k clip(change_k, C) + N(0, (z C)^2)) / m`` over everything that is sent, the head included. The
    denominator is fixed, so that adding or removing a client moves the sum by at most C. Weights by examples would make
    that bound depend on the data: all clients weigh the same.

    Parameters
    ----------
    largest_norm : C, of a client's change.
    noise_multiplier : z, the noise's standard deviation as a multiple of C.
    expected_clients : m: with `Independent` sampling the expected cohort size.
    seed : of the noise; keep it secret in a deployment.
    inner : the wrapped aggregator, which must be linear; it sees one update, the noisy mean.
    """

    largest_norm: float = 1.0
    noise_multiplier: float = 1.0
    expected_clients: float = 10.0
    seed: int = 0
    inner: DeclaringAggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        """Check numbers and the wrapped aggregator."""
        for name in ("largest_norm", "noise_multiplier", "expected_clients"):
            value = float(getattr(self, name))
            if not (math.isfinite(value) and (value > 0 or (name == "noise_multiplier" and value == 0))):
                raise InputError(f"method.{name}: {value:g} is not possible; valid: above 0")
        if isinstance(self.inner, IndependentSampling):
            raise InputError(
                "method.inner: IndependentSampling weighs clients by a_n / q_n, and here all weigh the same; valid: "
                "mean, with an independent sampler and expected_clients the expected size of its cohort"
            )
        if not is_linear(self.inner):
            raise InputError(
                f"method.inner: {type(self.inner).__name__} needs each client's factors, not one sum of them: noise "
                f"cannot hide a client; valid: mean, frozen-a, alternating, shared-factor, shared-core, refactoring, "
                f"merge-and-redraw"
            )

    @property
    def wrapped(self) -> DeclaringAggregator:
        """Return the wrapped aggregator."""
        return self.inner

    @property
    def linear(self) -> bool:
        """Return that one sum is all it needs."""
        return True

    @property
    def refuses(self) -> Mapping[Trait, str]:
        """Return what has no common coordinates, and what the wrapped aggregator cannot take."""
        return {**self.inner.refuses, **SAME_SLICE}

    def __call__(self, model: ServerModel, outcome: RoundOutcome) -> ServerModel:
        """Return the next model; a round in which nobody arrived is left out."""
        import torch

        updates = in_client_order(outcome.updates)
        if not updates:
            return model
        check_comparable(self.inner, model, updates, "client privacy")
        changes = [clip(change_of(update, outcome, model), self.largest_norm) for update in updates]
        total = torch.stack(changes).sum(dim=0)
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "client-privacy", model.version))
        noise = torch.empty_like(total).normal_(generator=generator)
        total += self.noise_multiplier * self.largest_norm * noise
        return self.inner(model, consensus(model, outcome, updates, total / self.expected_clients))


def epsilon(noise_multiplier: float, rounds: int, sampling_probability: float, delta: float) -> float:
    """Return the epsilon of some rounds of the Gaussian mechanism on Poisson samples of the clients.

    Renyi accounting by the library dp-accounting (the extra ``airtune[privacy]``). Delta should be well below one over
    the number of clients.

    Parameters
    ----------
    noise_multiplier : z of `ClientPrivacy`. rounds : number of aggregated rounds.
    sampling_probability : with which each client is in a cohort, independently (`Independent` sampling).
    delta : probability with which the guarantee may fail.

    Raises
    ------
    InputError : a number that is not possible, or the library is not installed.
    """
    if not (noise_multiplier > 0 and rounds >= 1 and 0 < sampling_probability <= 1 and 0 < delta < 1):
        raise InputError(
            f"privacy: noise {noise_multiplier:g}, {rounds} rounds, probability {sampling_probability:g} and delta "
            f"{delta:g} are not possible; valid: noise above 0, rounds from 1, probabilities within (0, 1]"
        )
    try:
        library = import_module("dp_accounting")
        rdp = import_module("dp_accounting.rdp")
    except ImportError as error:
        raise InputError("privacy: the accountant needs the package dp-accounting: airtune[privacy]") from error
    accountant: Any = rdp.RdpAccountant()
    event: Any = library.GaussianDpEvent(noise_multiplier)
    sampled = event if sampling_probability == 1 else library.PoissonSampledDpEvent(sampling_probability, event)
    accountant.compose(sampled, rounds)
    return float(accountant.get_epsilon(delta))
