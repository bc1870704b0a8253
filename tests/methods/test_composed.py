"""The pairwise table: every planner with every aggregator runs, or is refused with a reason."""

from typing import Any

import numpy as np
import pytest
import torch

from aggregation_examples import relative
from airtune.aggregation.error import aggregation_error
from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
from airtune.aggregation.registry import AGGREGATORS
from airtune.aggregation.residual import ResidualMerge
from airtune.aggregation.robust import CoordinateMedian, NormClipping, StalenessWeights, TrimmedMean
from airtune.aggregation.stacking import Stacking
from airtune.aggregation.truncation import Truncation
from airtune.capabilities import compatible
from airtune.errors import InputError
from airtune.experiment.combinations import check_combination
from airtune.federation import Stop, begin, run
from airtune.methods.adaptive_sampling import AdaptiveSampling
from airtune.methods.composed import PLANNERS, Composed
from airtune.methods.fedadapter import FedAdapter
from airtune.methods.fedit import FedIT
from airtune.methods.hetlora import HetLoRA
from airtune.methods.legend import Legend
from airtune.methods.tsfa import TSFA
from airtune.scheduling.bandwidth import EqualFinish
from airtune.scheduling.planner import Separate
from airtune.scheduling.power import LeastPower
from airtune.scheduling.sampling import All, Independent, Uniform, Weighted
from airtune.scheduling.slicing import Depth, FullSlice, RandomLayers, RankByMemory, Sketch
from airtune.scheduling.utility import Utility
from airtune.scheduling.work import ChoosesRanks
from airtune.training.shapes import ModelConfig
from airtune.types import RoundOutcome, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

WORLD = SyntheticWorld(make_fleet(7))

PLANNER_ROWS: list[Any] = [
    *(
        Separate(sampler, slicer)
        for sampler in (All(), Uniform(3), Weighted(3), Independent(3.0), Utility(3))
        for slicer in (FullSlice(), RankByMemory(), Depth(2), Depth(outside="absent"), RandomLayers(), Sketch(2))
    ),
    Separate(bandwidth=EqualFinish(), power=LeastPower()),
    AdaptiveSampling(polish_evaluations=0),
    FedAdapter(first_width=1),
    HetLoRA(lowest_rank=1),
    Legend(reference_rank=2),
    Legend(reference_rank=2, drop_straggler=True),
    Legend(reference_rank=2, variant="C"),
    TSFA(),
    TSFA(pilot_rounds=0, queues="client"),
]
AGGREGATOR_ROWS: list[Any] = [
    *(Mean(absent=absent) for absent in ("excluded", "unchanged", "zero")),
    FrobeniusWeighted("model"),
    IndependentSampling("uniform"),
    *(kind() for kind in AGGREGATORS.values()),
]


@pytest.mark.parametrize("aggregator", AGGREGATOR_ROWS, ids=lambda a: f"{type(a).__name__}-{AGGREGATOR_ROWS.index(a)}")
@pytest.mark.parametrize("planner", PLANNER_ROWS, ids=lambda p: f"{type(p).__name__}-{PLANNER_ROWS.index(p)}")
def test_every_pair_runs_or_is_refused_with_a_reason(planner: Any, aggregator: Any) -> None:
    reason = compatible(planner, aggregator)
    if reason is not None:
        assert len(reason) > 20
        with pytest.raises(InputError, match="is refused"):
            Composed(planner, aggregator)
        return
    method = Composed(planner, aggregator)
    ranks = method.ranks(make_adapter().shape) if isinstance(method, ChoosesRanks) else 4
    start = begin(method, ServerModel(make_adapter(ranks=ranks)), WORLD)
    for progress, record in run(method, start, WORLD, WORLD, stop=Stop(2), seed=0, evaluate=lambda _: {}):
        assert all(bool(torch.isfinite(t).all()) for _, _, t in progress.model.adapter.tensors())
        assert set(record.arrived) == set(record.cohort)


def test_the_table_has_pairs_that_run_and_pairs_that_do_not() -> None:
    verdicts = [compatible(p, a) for p in PLANNER_ROWS for a in AGGREGATOR_ROWS]
    assert verdicts.count(None) > 100
    assert len(verdicts) - verdicts.count(None) > 10


def test_known_verdicts() -> None:
    assert compatible(Legend(), Mean()) is None
    assert compatible(HetLoRA(), FrobeniusWeighted()) is None
    assert compatible(Separate(Independent(2.0)), IndependentSampling()) is None
    assert "norm zero" in str(compatible(Legend(), FrobeniusWeighted()))
    assert "probability" in str(compatible(Legend(drop_straggler=True), IndependentSampling()))
    assert "shrink" in str(compatible(Separate(slicer=Sketch(2)), Mean(absent="zero")))


def one_round(method: Composed) -> tuple[ServerModel, RoundOutcome, ServerModel]:
    """Return a first round: before, what arrived, after."""
    ranks = method.ranks(make_adapter().shape) if isinstance(method, ChoosesRanks) else 4
    start = begin(method, ServerModel(make_adapter(ranks=ranks)), WORLD)
    plan = method.plan(start.state, WORLD.observe(1, 0.0, start.pending, start.model), np.random.default_rng(0))
    outcome, _ = WORLD.run(plan, start.model, start.pending, round_index=1, time=0.0)
    after, _ = method.aggregate(start.state, start.model, outcome)
    return start.model, outcome, after


def test_legends_depths_with_fedex_are_exact_over_the_owners_of_each_layer() -> None:
    """The pair of the issue: unequal ranks and depths, and nothing of the products is lost."""
    assert compatible(Legend(), ResidualMerge()) is None
    before, outcome, after = one_round(Composed(Legend(reference_rank=2), ResidualMerge()))
    assert len({frozenset(update.task.send.components) for update in outcome.updates}) > 1  # depths do differ
    assert aggregation_error(before, outcome, after)["aggregation_error"] < 1e-5
    averaged = Mean()(before, outcome)
    assert aggregation_error(before, outcome, averaged)["aggregation_error"] > 1e-3


def test_independent_sampling_with_flexlora_truncates_the_mean_of_the_products() -> None:
    planner = Separate(Independent(5.0), RankByMemory())
    assert compatible(planner, Truncation()) is None
    _, outcome, after = one_round(Composed(planner, Truncation()))
    assert len(outcome.updates) > 1
    shares = np.array([float(outcome.fleet.num_examples[u.task.client]) for u in outcome.updates])
    for slot, factors in after.adapter.factors.items():
        pairs = zip(shares / shares.sum(), outcome.updates, strict=True)
        mean = torch.stack([w * u.values.factors[slot].cast(torch.float64).product() for w, u in pairs]).sum(0)
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        best = (u[:, : factors.rank] * s[: factors.rank]) @ vh[: factors.rank]
        assert relative(factors.product().double() - best, best) < 1e-5


def test_every_named_planner_and_aggregator_is_in_the_table() -> None:
    assert {type(p) for p in PLANNER_ROWS} >= set(PLANNERS.values())
    assert {type(a) for a in AGGREGATOR_ROWS} >= set(AGGREGATORS.values())


def test_fedit_is_separate_with_mean() -> None:
    """The same cohort, the same plan, the same model: FedIT adds nothing of its own."""
    runs = []
    for method in (FedIT(cohort_size=3), Composed(Separate(Uniform(3)), Mean())):
        start = begin(method, ServerModel(make_adapter()), WORLD)
        records = [r for _, r in run(method, start, WORLD, WORLD, stop=Stop(3), seed=1, evaluate=lambda _: {})]
        runs.append([(r.cohort, r.time_s, r.uplink_bits) for r in records])
    assert runs[0] == runs[1]


def test_what_a_wrapper_wraps_decides_with_which_adapters_it_goes() -> None:
    """Beams go with rules on products and bottlenecks with averages, clipped or not; never beams by single values."""
    beam, bottleneck = ModelConfig(adapter="beam-lora"), ModelConfig(adapter="bottleneck")
    clipped = Composed(aggregator=NormClipping(inner=StalenessWeights(inner=Stacking())))
    check_combination(beam, clipped, "composed")
    check_combination(bottleneck, Composed(aggregator=NormClipping(inner=Mean())), "composed")
    for rule in (NormClipping(), TrimmedMean(inner=Stacking()), CoordinateMedian(inner=Truncation())):
        with pytest.raises(InputError, match="beam-lora"):
            check_combination(beam, Composed(aggregator=rule), "composed")
    with pytest.raises(InputError, match="bottleneck"):
        check_combination(bottleneck, clipped, "composed")
