"""Kinds of adapters x optimizers x methods: every triple runs, or is refused with the reason given here.

All refusals are checked here, and a part of the runs: every kind under every method, and with every optimizer. The slow
test runs all triples that are not refused.
"""

from dataclasses import fields, replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest

from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.experiment.combinations import check_combination
from airtune.federation import Stop, begin, run
from airtune.methods import built_in_names, method_class
from airtune.optimizers import OPTIMIZERS
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.scheduling.work import ChoosesRanks
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.training.local import LocalTrainer
from airtune.training.shapes import ADAPTER_KINDS, ModelConfig
from airtune.types import LocalTraining, ServerModel
from tiny_networks import federated, tokens

ROWS = [np.arange(0, 14), np.arange(14, 26), np.arange(26, 40)]
METHODS = [name for name in built_in_names() if "training" in {f.name for f in fields(method_class(name))}]
FIELDS = {
    "adaptive-sampling": {"constants": RoundConstants(20.0, 4.0), "polish_evaluations": 5},
    "fedbuff": {"concurrency": 2, "buffer_size": 2},
    "legend": {"reference_rank": 4},
    "mole": {"expert_rounds": 1},
}
MERGING = {"flora", "florist", "fedex-lora", "rac-lora", "galore-avg"}
PRODUCTS = {"flora", "florist", "fedex-lora", "flexlora"}
NEVER_B = {"fed-sb", "galore-avg"}
FIXED = {"ffa-lora", "fedsvd", "rac-lora", "rolora", "galore-avg"}
ORTHONORMAL = {"rac-lora", "galore-avg"}  # ffa-lora and fedsvd where `rows` says so
FACTOR_AVERAGES = {
    "composed",
    "fedadapter",
    "fedit",
    "fedra",
    "hierfedlora",
    "legend",
    "adaptive-sampling",
    "tsfa",
    "fslora",
    "soft",
}


def method_of(name, optimizer):
    training = LocalTraining(local_steps=1, batch_size=4, learning_rate=0.01, optimizer=optimizer)
    return method_class(name)(training=training, **FIELDS.get(name, {}))


@lru_cache(maxsize=16)
def model_of(kind):
    return federated("bert", adapter=kind)


def run_of(kind, optimizer, name, rounds, method=None):
    """Check, build and run as an experiment does."""
    method = method or method_of(name, optimizer)
    check_combination(ModelConfig(adapter=kind), method, name)
    model = model_of(kind)
    ranks = method.ranks(model.shape) if isinstance(method, ChoosesRanks) else None
    start = ServerModel(model.initial_adapter(0, ranks))
    counts = np.array([[8, 4, 2], [2, 6, 4], [4, 4, 6]])
    fleet = fleet_of([load_profile("jetson-tx2")] * 3, np.array([len(rows) for rows in ROWS]), counts)
    first = begin(method, start, _StartOnly(fleet))
    network = TransformerShape.from_config(model.config_json)
    costs = CostModel(fleet, first.model.adapter.shape, network, tokens=np.full(3, 8.0), constant_bytes=0.0)
    cell = Cell(nominal=fleet, costs=costs, seed=0)
    runner = SimulatedRunner(cell, costs, LocalTrainer(model, tokens(), ROWS, 0), 0)
    done = list(run(method, first, cell, runner, stop=Stop(rounds), seed=0, evaluate=lambda _: {"accuracy": 0.0}))
    model.show(done[-1][0].model)
    return done[-1]


class _StartOnly:
    def __init__(self, fleet):
        self.fleet = fleet


def reason(kind, optimizer, name):
    """Return the words with which a triple is refused before anything is loaded, None if it is not: the table."""
    if name == "mole" and kind != "mole":
        return "mole does not go with" if kind not in ("bottleneck", "beam-lora") else "model.adapter"
    if kind == "beam-lora" and name not in PRODUCTS:
        return "copies components during local training"
    if kind == "beam-lora" and optimizer == "lora-rite":
        return "moves the moments of single components"
    if kind == "mole" and name in MERGING:
        return "merges them into the base"
    if kind == "dora" and name in NEVER_B:
        return "never trains"
    if kind == "bottleneck" and (name not in FACTOR_AVERAGES or optimizer not in ("adamw", "sgd", "lora-plus")):
        return "bottleneck adapters have no product"
    if optimizer == "galore" and kind in ("dora", "mole"):
        return "galore descends the weight itself"
    if optimizer == "galore" and name not in FIXED:
        return "galore needs a fixed projector"
    if optimizer == "galore" and name not in ORTHONORMAL:
        return "galore needs a projector with orthonormal columns"
    return None


TRIPLES = list(product(ADAPTER_KINDS, OPTIMIZERS, METHODS))


def test_the_whole_table_of_refusals():
    wrong = []
    for kind, optimizer, name in TRIPLES:
        expected = reason(kind, optimizer, name)
        try:
            check_combination(ModelConfig(adapter=kind), method_of(name, optimizer), name)
            found = None
        except InputError as error:
            found = str(error)
            assert "valid: " in found and "\n" not in found
        if (found is None) != (expected is None) or (expected and expected not in found):
            wrong.append((kind, optimizer, name, expected, found))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_under_every_method_trains_or_says_why_not(name):
    for kind in ADAPTER_KINDS:
        if reason(kind, "adamw", name) is None:
            attempt(kind, "adamw", name)


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_every_kind_with_every_optimizer_trains(kind):
    for optimizer, name in product(OPTIMIZERS, ("fedit", "flexlora", "galore-avg")):
        if reason(kind, optimizer, name) is None:
            attempt(kind, optimizer, name)


RANKS_OF_THEIR_OWN = {("msp-lora", "legend"): "msp-lora has ranks of its own"}


def attempt(kind, optimizer, name, rounds=1):
    """Run some rounds; where the sizes do not fit the method says so."""
    try:
        _, record = run_of(kind, optimizer, name, rounds)
    except InputError as error:
        assert RANKS_OF_THEIR_OWN.get((kind, name), "not expected") in str(error), (kind, optimizer, name)
        return
    assert record.arrived and not record.dropped, (kind, optimizer, name)
    assert (kind, name) not in RANKS_OF_THEIR_OWN


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_triple_that_is_not_refused_runs(name):
    for kind, optimizer in product(ADAPTER_KINDS, OPTIMIZERS):
        if reason(kind, optimizer, name) is None:
            attempt(kind, optimizer, name, rounds=2)


@pytest.mark.parametrize("name", ["ffa-lora", "fedsvd"])
def test_galore_goes_with_a_factor_that_is_drawn_orthonormal(name):
    method = replace(method_of(name, "galore"), rows="orthonormal")
    check_combination(ModelConfig(), method, name)
    _, record = run_of("lora", "galore", name, rounds=2, method=method)
    assert record.arrived and not record.dropped


def test_a_wrapped_aggregator_does_not_hide_a_merge():
    from airtune.aggregation.robust import NormClipping
    from airtune.aggregation.stacking import Stacking
    from airtune.methods.composed import Composed

    composed = Composed(aggregator=NormClipping(inner=Stacking()))
    with pytest.raises(InputError, match="merges them into the base"):
        check_combination(ModelConfig(adapter="mole"), composed, "composed")
    check_combination(ModelConfig(adapter="mole"), replace(composed, aggregator=NormClipping()), "composed")
