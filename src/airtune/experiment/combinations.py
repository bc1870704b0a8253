"""What cannot be combined with a method: kinds of adapters and optimizers that need another factor to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from airtune.aggregation.declaring import exchange_of, redraws
from airtune.aggregation.groups import GroupMean
from airtune.aggregation.mean import IndependentSampling, Mean
from airtune.aggregation.one_factor import MergeAndRedraw
from airtune.aggregation.privacy import ClientPrivacy
from airtune.aggregation.residual import ResidualMerge
from airtune.aggregation.robust import CoordinateMedian, TrimmedMean
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import PrincipalSplit, Truncation
from airtune.errors import InputError
from airtune.lora import BOTH, Factor
from airtune.methods.fedopt import FedOpt
from airtune.optimizers import SGD, AdamW, GaLore, LoraPlus, LoraRite, as_optimizer
from airtune.training.shapes import ModelConfig


def trained_factors(method: Any) -> tuple[frozenset[Factor], ...] | None:
    """Return which factors clients train in an odd and in an even round; None if the method does not say."""
    parts = getattr(method, "composed", method)
    aggregator = getattr(parts, "aggregator", None)
    return None if aggregator is None else tuple(exchange_of(aggregator, index).train for index in (1, 2))


def check_combination(model: ModelConfig, method: Any, name: str) -> None:
    """Refuse what a method cannot carry, before anything is loaded.

    Raises
    ------
    InputError : DoRA, whose norms are trained with B, where no round trains B; GaLore, which needs a projector, where
        both factors are trained, or with DoRA; BeamLoRA, where factors are averaged component by component; bottleneck
        adapters, whose product means nothing, where anything but averages of factors is made; MoLE, whose gates a merge
        would lose, where anything is merged into the base; and a method made for one kind of adapter with another.
    """
    layers = list(layers_of(method))
    # an optimizer of the server merges what it adds
    pushed = any(isinstance(layer, FedOpt) and redraws(layer.method) for layer in layers)
    method = layers[-1]
    trained = trained_factors(method)
    if model.adapter == "bottleneck":
        _check_averages(method, name)
    if model.adapter == "beam-lora":
        _check_products(method, name)
    _check_mixture(model, method, name, pushed)
    optimizer = getattr(getattr(method, "training", None), "optimizer", None)
    if model.adapter == "dora" and trained is not None and not any("B" in factors for factors in trained):
        raise InputError(
            f"model.adapter: dora trains the norms of rows together with B, which {name} never trains; "
            "valid: lora, rslora, or another method"
        )
    if not isinstance(optimizer, GaLore):
        return
    if model.adapter in ("dora", "mole"):
        raise InputError(
            f"training.optimizer: galore descends the weight itself, {model.adapter} its parts; valid: adapter = lora"
        )
    if trained is None or BOTH in trained or frozenset() in trained:
        raise InputError(
            f"training.optimizer: galore needs a fixed projector, and {name} has none; valid: a method that fixes one "
            "factor with orthonormal components (galore-avg, rac-lora)"
        )
    if not _draws_orthonormal(method):
        raise InputError(
            f"training.optimizer: galore needs a projector with orthonormal columns, and the fixed factor of {name} "
            'has none; valid: galore-avg, or rac-lora, ffa-lora and fedsvd with rows = "orthonormal"'
        )


def _draws_orthonormal(method: Any) -> bool:
    """Return whether the factor that is not trained is orthonormal: as it is drawn first, or for every round."""
    aggregator = _innermost(method)
    drawn = getattr(aggregator, "start", None) or getattr(aggregator, "redraw", None)
    return getattr(drawn, "law", None) == "orthonormal"


_AVERAGES = (Mean, IndependentSampling, GroupMean)
_PLAIN_OPTIMIZERS = (AdamW, SGD, LoraPlus)


def _check_averages(method: Any, name: str) -> None:
    """Refuse what works on the product B A, between which a bottleneck has its ReLUs."""
    resizes = getattr(method, "variant", None) == "C" and getattr(method, "shrink", None) == "svd"
    if not isinstance(_innermost(method), _AVERAGES) or resizes:
        raise InputError(
            f"model.adapter: bottleneck adapters have no product B A, with which {name} works; valid: a method that "
            "averages factors (fedadapter, fedit, fedra, hierfedlora, legend but for variant C with svd)"
        )
    optimizer = as_optimizer(getattr(getattr(method, "training", None), "optimizer", "adamw"))
    if not isinstance(optimizer, _PLAIN_OPTIMIZERS):
        raise InputError(
            "training.optimizer: bottleneck adapters have no product B A to follow; valid: adamw, sgd, lora-plus"
        )


def layers_of(method: Any) -> Iterator[Any]:
    """Yield a method, and those that it wraps; the last one wraps none."""
    while True:
        yield method
        if not hasattr(method, "method"):
            return
        method = method.method


def rules_of(method: Any) -> Iterator[Any]:
    """Yield a method's aggregator, and those that it wraps."""
    rule = getattr(getattr(method, "composed", method), "aggregator", None)
    while rule is not None:
        yield rule
        rule = getattr(rule, "inner", None)


def _innermost(method: Any) -> Any:
    """Return the aggregator inside all wrappers, None if the method has none."""
    return next(iter(reversed(list(rules_of(method)))), None)


_BY_VALUE = (TrimmedMean, CoordinateMedian, ClientPrivacy)
_MERGES = (Stacking, EnergyThreshold, PrincipalSplit, ResidualMerge, MergeAndRedraw)


def _check_mixture(model: ModelConfig, method: Any, name: str, pushed: bool) -> None:
    """Refuse MoLE where something is merged into the base, and a method that is made for it with anything else."""
    if model.adapter == "mole" and (pushed or isinstance(_innermost(method), _MERGES)):
        raise InputError(
            f"model.adapter: mole weighs its experts by the text, and {name} merges them into the base, which has "
            "no gates; valid: mole, or another method that keeps what it averages in the adapter (fedit, flexlora)"
        )
    needed = getattr(type(method), "only_adapter", model.adapter)
    if model.adapter != needed:
        raise InputError(f"model.adapter: {name} does not go with {model.adapter}; valid: {needed}")


_PRODUCTS = (Stacking, EnergyThreshold, Truncation, PrincipalSplit, ResidualMerge)


def _check_products(method: Any, name: str) -> None:
    """Refuse methods that average, or compare, components which no longer correspond."""
    rules = list(rules_of(method))
    by_value = any(isinstance(rule, _BY_VALUE) for rule in rules)
    if by_value or not isinstance(_innermost(method), _PRODUCTS):
        raise InputError(
            "model.adapter: beam-lora copies components during local training, so that they do not correspond from "
            f"client to client, and {name} averages factors; valid: a method that aggregates products (flora, "
            "flexlora, fedex-lora, florist)"
        )
    training = getattr(method, "training", None)
    if isinstance(getattr(training, "optimizer", None), LoraRite):
        raise InputError(
            "training.optimizer: beam-lora moves the moments of single components, which lora-rite does not have; "
            "valid: adamw, sgd, lora-plus, lora-pro"
        )
