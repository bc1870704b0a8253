"""Below the layer's size no rule makes a matrix of the layer's size: every operation of torch is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aggregation_examples import SIZES, random_adapter, round_of
from airtune.aggregation.declaring import exchange_of
from airtune.aggregation.privacy import ClientPrivacy
from airtune.aggregation.registry import AGGREGATORS
from airtune.aggregation.residual import RidgeCorrection
from airtune.federation import prepared
from airtune.methods.composed import Composed
from airtune.methods.fedopt import FedOpt
from airtune.types import ServerModel

DENSE = {shape for size in SIZES.values() for shape in (size, size[::-1])}


class Watch(TorchDispatchMode):
    """Remembers operations whose result has the size of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor) and tuple(part.shape[-2:]) in DENSE:
                self.found.append(str(func))
        return result


def watched(rule: Any) -> list[str]:
    """Return what two rounds of three clients of rank 2 make; their summed rank stays below 24."""
    model = prepared(rule, ServerModel(random_adapter(2)))
    with Watch() as watch:
        for number in (1, 2):
            model = rule(model, round_of(model, (3, 1, 2), tensors=exchange_of(rule, number).send, seed=number))
    assert model.version == 2
    return watch.found


@pytest.mark.parametrize("name", AGGREGATORS)
def test_no_rule_makes_a_dense_update(name: str) -> None:
    assert watched(AGGREGATORS[name]()) == []


@pytest.mark.parametrize("name", ["norm-clipping", "staleness-weights", "coordinate-median"])
def test_wrappers_of_exact_rules_make_none_either(name: str) -> None:
    for inner in ("stacking", "residual-merge", "truncation"):
        assert watched(AGGREGATORS[name](inner=AGGREGATORS[inner]())) == []  # type: ignore[call-arg]
    assert watched(ClientPrivacy(inner=AGGREGATORS["refactoring"]())) == []


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_step_on_products_makes_none_while_its_rank_is_small(rule: Any) -> None:
    method = FedOpt(Composed(aggregator=AGGREGATORS["stacking"]()), rule=rule, second_moment="tensor")
    model = prepared(method, ServerModel(random_adapter(1)))
    with Watch() as watch:
        method.aggregate(method.init(model, None), model, round_of(model, (3, 1, 2)))  # type: ignore[arg-type]
    assert watch.found == []


def test_the_watch_sees_the_published_correction_which_is_dense() -> None:
    assert watched(RidgeCorrection(correction="published", iterations=2)) != []
