"""FedOpt: any method, with an optimizer of the server on top (FedAvgM, FedAdam, FedYogi, FedAdagrad)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from airtune.aggregation.declaring import redraws, reshaped, weakens_products
from airtune.aggregation.product_step import step_on_products
from airtune.aggregation.server_optimizer import Moment, Rule, SecondMoment, ServerStep
from airtune.errors import InputError
from airtune.federation import prepared
from airtune.lora import AdapterShape
from airtune.methods.composed import Composed
from airtune.scheduling.work import ChoosesRanks
from airtune.types import Fleet, Method, Observation, Plan, RoundOutcome, ServerModel


@dataclass(frozen=True)
class Both:
    """The wrapped method's state, and the moments of the server's optimizer."""

    inner: Any
    moment: Moment


@dataclass(frozen=True)
class FedOpt:
    """Takes the change that a method's aggregation makes as a gradient, and lets the server's optimizer use it.

    Paper: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295.

    =====================  ==================================================================
    paper                  here
    =====================  ==================================================================
    Delta_t                the adapter after the wrapped method's aggregation minus the one before
    eta, tau               `learning_rate`, `adaptivity`
    beta_1, beta_2         `beta1`, `beta2`
    v_{-1}                 tau^2
    =====================  ==================================================================

    Departures. The pseudo-gradient is that of A, B, cores and head, each tensor on its own; what such a method merges
    into the base (FedEx-LoRA) is merged as it is. Methods that draw their adapter anew or take its basis from an SVD
    have no such gradient: there the optimizer follows the change of their products, and merges what it adds into the
    base (`airtune.aggregation.product_step`). The adaptive rules' mean square of single values is dense there, so
    that ``second_moment = "tensor"`` has to be asked for: one mean square for each module.

    Parameters
    ----------
    method : the wrapped method; by default FedIT without a limit on the cohort.
    rule : "momentum" (FedAvgM), "adam", "yogi" or "adagrad".
    learning_rate, beta1, beta2, adaptivity, second_moment : of the server's optimizer (`ServerStep`).
    """

    method: Method[Any] = field(default_factory=Composed)
    rule: Rule = "adam"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    adaptivity: float = 1e-3
    second_moment: SecondMoment = "value"

    arxiv: ClassVar[str] = "2003.00295"
    citation: ClassVar[str] = """@inproceedings{reddi2021fedopt,
  title     = {Adaptive Federated Optimization},
  author    = {Reddi, Sashank J. and Charles, Zachary and Zaheer, Manzil and Garrett, Zachary and Rush, Keith and
               Kone{\\v{c}}n{\\'y}, Jakub and Kumar, Sanjiv and McMahan, H. Brendan},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  note      = {arXiv:2003.00295}
}"""

    def __post_init__(self) -> None:
        """Check the optimizer's fields, and that single values have a gradient if the rule wants them."""
        step = self.step
        if redraws(self.method) and step.rule != "momentum" and step.second_moment == "value":
            raise InputError(
                f"method.second_moment: {type(self.method).__name__} changes the adapter's basis every round, so that "
                f'single values have no mean square for {step.rule}; valid: "tensor" (or method.rule = "momentum")'
            )

    @property
    def step(self) -> ServerStep:
        """Return the server's optimizer."""
        return ServerStep(self.rule, self.learning_rate, self.beta1, self.beta2, self.adaptivity, self.second_moment)

    @property
    def redraws(self) -> bool:
        """Return whether the wrapped method changes the adapter's basis every round."""
        return redraws(self.method)

    @property
    def weakens_products(self) -> bool:
        """Return whether the wrapped method weakens stale changes as products."""
        return weakens_products(self.method)

    def prepare(self, model: ServerModel) -> ServerModel:
        """Return the model that the wrapped method starts from."""
        return prepared(self.method, model)

    def reshape(self, shape: AdapterShape) -> AdapterShape:
        """Return the sizes of the adapter that the wrapped method starts from."""
        return reshaped(self.method, shape)

    def ranks(self, shape: AdapterShape) -> Mapping[str, int]:
        """Return the ranks that the wrapped method wants."""
        if isinstance(self.method, ChoosesRanks):
            return self.method.ranks(shape)
        return {name: slot.rank for name, slot in shape.slots.items()}

    def init(self, model: ServerModel, fleet: Fleet) -> Both:
        """Return the wrapped method's state and no moments yet."""
        return Both(self.method.init(model, fleet), Moment())

    def plan(self, state: Both, seen: Observation, rng: np.random.Generator) -> Plan:
        """Return the wrapped method's plan."""
        return self.method.plan(state.inner, seen, rng)

    def aggregate(self, state: Both, model: ServerModel, outcome: RoundOutcome) -> tuple[ServerModel, Both]:
        """Let the wrapped method aggregate, then take the server's step along the change."""
        after, inner = self.method.aggregate(state.inner, model, outcome)
        if after.version == model.version:
            return after, replace(state, inner=inner)
        if redraws(self.method):
            after, moment = step_on_products(self.step, model, after, state.moment)
            return after, Both(inner, moment)
        adapter, moment = self.step(model.adapter, after.adapter, state.moment)
        return replace(after, adapter=adapter), Both(inner, moment)
