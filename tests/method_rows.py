"""The rows of the conformance table: each method as it is tested, and which properties do not hold for it, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airtune.aggregation.mean import IndependentSampling, Mean
from airtune.aggregation.one_factor import FrozenA
from airtune.compression.soft import Soft
from airtune.methods import built_in_names, method_class, method_names
from airtune.methods.adaptive_sampling import AdaptiveSampling
from airtune.methods.composed import Composed
from airtune.methods.fed_sb import FedSB
from airtune.methods.fedadapter import FedAdapter
from airtune.methods.fedbuff import FedBuff
from airtune.methods.fedex_lora import FedExLoRA
from airtune.methods.fedit import FedIT
from airtune.methods.fedopt import FedOpt
from airtune.methods.fedra import FedRA
from airtune.methods.fedsa_lora import FedSALoRA
from airtune.methods.fedsvd import FedSVD
from airtune.methods.ffa_lora import FFALoRA
from airtune.methods.flexlora import FlexLoRA
from airtune.methods.flora import FLoRA
from airtune.methods.florist import FLoRIST
from airtune.methods.fslora import FSLoRA
from airtune.methods.galore_avg import GaLoreAverage
from airtune.methods.hetlora import HetLoRA
from airtune.methods.hierfedlora import HierFedLoRA
from airtune.methods.legend import Legend
from airtune.methods.lora_fair import LoRAFair
from airtune.methods.mole import MoLE
from airtune.methods.rac_lora import RACLoRA
from airtune.methods.rolora import RoLoRA
from airtune.methods.soft import SoftLoRA
from airtune.methods.tsfa import TSFA
from airtune.methods.wrappers import Deadline, FirstArrivals, Staleness
from airtune.scheduling.bandwidth import EqualFinish
from airtune.scheduling.joint_cohort import RoundConstants
from airtune.scheduling.planner import Separate
from airtune.scheduling.sampling import Independent, Uniform, Weighted
from airtune.scheduling.slicing import Depth, RankByMemory, Sketch

FULL = "everyone takes part and nothing is random, so the seed has nothing to change in the plan"
TRUNCATED = "clients of lower rank see a truncated model, and its product is what they send back"
PADDED = "zero padding shrinks the components that few clients hold"
FIXED = "the method keeps the clients that it likes whatever the seed is"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name : of the method in the registry. method : as it is tested.
    exceptions : property -> why it does not hold: "seed" (another seed gives another plan), "fixed point" (clients that
        change nothing leave the model as it is), "unsent" (what nobody sent does not change).
    exact : whether the fixed point holds to the bit, or within rounding.
    """

    name: str
    method: Any
    exceptions: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True


ROWS = [
    Row("adaptive-sampling", AdaptiveSampling(polish_evaluations=20, constants=RoundConstants(20.0, 4.0))),
    Row(
        "adaptive-sampling",
        AdaptiveSampling(sampling="uniform", expected_cohort_size=0.8, replan_every=2, noise="losses", weight_cap=4.0),
    ),
    Row(
        "adaptive-sampling",
        AdaptiveSampling(
            sampling="weighted", sizes="largest", expected_cohort_size=0.8, noise="gradients", replan_every=1
        ),
    ),
    Row("fedit", FedIT(cohort_size=1)),
    Row("fedit", FedIT(weights="uniform", bandwidth=EqualFinish()), {"seed": FULL}),
    Row("hetlora", HetLoRA(lowest_rank=1, cohort_size=1), {}),
    Row("hetlora", HetLoRA(lowest_rank=1, decay=0.5, scope="model"), {"seed": FULL, "fixed point": PADDED}),
    Row("hierfedlora", HierFedLoRA(groups=2, most_frequency=3), {"seed": FULL}),
    Row("hierfedlora", HierFedLoRA(groups=3, grouping="random", weights="normalised", regroup_rounds=1)),
    Row("hierfedlora", HierFedLoRA(groups=2, step_budget=4, wait_tolerance=0.1, cohort_size=1)),
    Row("legend", Legend(reference_rank=2), {"seed": FULL}),
    Row(
        "legend",
        Legend(reference_rank=2, variant="B", outside="absent", weights="examples", drop_straggler=True),
        {"seed": FULL},
    ),
    Row(
        "legend",
        Legend(reference_rank=2, variant="C", shrink="truncate"),
        {"seed": FULL, "fixed point": "ranks change", "unsent": "what a round left out acts no more, on purpose"},
    ),
    Row("legend", Legend(reference_rank=3, profile="uniform", fixed_depth=2, cohort_size=1)),
    Row("deadline", Deadline(Legend(reference_rank=2, cohort_size=1), seconds=1e9)),
    Row("first-arrivals", FirstArrivals(FedIT(cohort_size=1), updates=3, late="keep")),
    Row("staleness", Staleness(HetLoRA(lowest_rank=1, cohort_size=1))),
    Row("fedadapter", FedAdapter(first_width=1, patience=1, cohort_size=1)),
    Row("fedadapter", FedAdapter(first_depth=2, least_gain=0.0, weights="uniform"), {"seed": FULL}),
    Row("fedbuff", FedBuff(concurrency=1, buffer_size=1)),
    Row("fed-sb", FedSB(cohort_size=1)),
    Row("fedex-lora", FedExLoRA(cohort_size=1, weights="uniform"), exact=False),
    Row("fedex-lora", FedExLoRA(lowest_rank=1, residual_rank=2), {"seed": FULL, "fixed point": TRUNCATED}),
    Row("fedra", FedRA(cohort_size=1)),
    Row("fedra", FedRA(least_layers=2, outside="absent", weights="uniform", cohort_size=1)),
    Row("fedopt", FedOpt(), {"seed": FULL}),
    Row("fedopt", FedOpt(Composed(Separate(Uniform(1)), FrozenA()), rule="momentum", learning_rate=0.5)),
    Row("fedopt", FedOpt(FLoRA(), second_moment="tensor"), {"seed": FULL}, exact=False),
    Row("fedsa-lora", FedSALoRA(cohort_size=1)),
    Row("fedsa-lora", FedSALoRA(shared="B"), {"seed": FULL}),
    Row("fedsvd", FedSVD(cohort_size=1), exact=False),
    Row("fedsvd", FedSVD(rows="orthonormal", period=2), {"seed": FULL}),
    Row("ffa-lora", FFALoRA(cohort_size=1)),
    Row("ffa-lora", FFALoRA(rows="orthonormal", weights="uniform"), {"seed": FULL}),
    Row("flexlora", FlexLoRA(cohort_size=1), exact=False),
    Row("flexlora", FlexLoRA(lowest_rank=1, balanced=True), {"seed": FULL, "fixed point": TRUNCATED}, exact=False),
    Row("flora", FLoRA(cohort_size=1), exact=False),
    Row("flora", FLoRA(lowest_rank=1), {"seed": FULL}, exact=False),
    Row("florist", FLoRIST(cohort_size=1, lowest_rank=2), exact=False),
    Row("fslora", FSLoRA(cohort_size=1)),
    Row("fslora", FSLoRA(assign="random", scope="client", download="all", weights="examples")),
    Row("galore-avg", GaLoreAverage(cohort_size=1), exact=False),
    Row("lora-fair", LoRAFair(cohort_size=1), exact=False),
    Row("lora-fair", LoRAFair(correction="published", iterations=3), {"seed": FULL}, exact=False),
    Row("mole", MoLE(expert_rounds=2, clusters="index", cohort_size=1)),
    Row("mole", MoLE(expert_rounds=1, clusters="index", personal=True, balance=0.0), {"seed": FULL}),
    Row("rac-lora", RACLoRA(cohort_size=1, rows="gaussian"), exact=False),
    Row("rac-lora", RACLoRA(lowest_rank=1), {"seed": FULL}, exact=False),
    Row("rolora", RoLoRA(cohort_size=1)),
    Row("soft", SoftLoRA(cohort_size=1)),
    Row("soft", SoftLoRA(compressor=Soft(0.5, fill="zero"), orthogonality="mixed"), {"seed": FULL}, exact=False),
    Row("tsfa", TSFA(cohort_size=1, pilot_rounds=0)),
    Row("tsfa", TSFA(pilot_rounds=0, queues="client", rate_quantile=0.1), {"seed": FULL}),
    Row("tsfa", TSFA(candidate_ranks=(2,)), {"seed": FULL, "fixed point": "the pilot ends with a smaller rank"}),
    Row("composed", Composed(Separate(Uniform(1), RankByMemory()), Mean(absent="unchanged"))),
    Row("composed", Composed(Separate(Weighted(1), Depth()))),
    Row("composed", Composed(Separate(Independent(0.9), Sketch(2)), IndependentSampling())),
]


def third_party_rows() -> list[Row]:
    """Return one row for every method of another installed package, with its default fields."""
    return [Row(name, method_class(name)(), {"seed": FIXED}) for name in method_names() if name not in built_in_names()]
