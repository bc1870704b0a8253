"""The aggregators by the names that an experiment file uses."""

from __future__ import annotations

from collections.abc import Mapping

from airtune.aggregation.declaring import DeclaringAggregator
from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
from airtune.aggregation.one_factor import Alternating, FrozenA, MergeAndRedraw, SharedCore, SharedFactor
from airtune.aggregation.privacy import ClientPrivacy
from airtune.aggregation.residual import ResidualMerge, RidgeCorrection
from airtune.aggregation.robust import CoordinateMedian, NormClipping, StalenessWeights, TrimmedMean
from airtune.aggregation.stacking import EnergyThreshold, Stacking
from airtune.aggregation.truncation import PrincipalSplit, Refactoring, Truncation

__all__ = ["AGGREGATORS", "DeclaringAggregator"]

AGGREGATORS: Mapping[str, type[DeclaringAggregator]] = {
    "mean": Mean,
    "frobenius-weighted": FrobeniusWeighted,
    "independent-sampling": IndependentSampling,
    "stacking": Stacking,
    "energy-threshold": EnergyThreshold,
    "truncation": Truncation,
    "principal-split": PrincipalSplit,
    "refactoring": Refactoring,
    "residual-merge": ResidualMerge,
    "ridge-correction": RidgeCorrection,
    "frozen-a": FrozenA,
    "alternating": Alternating,
    "shared-factor": SharedFactor,
    "shared-core": SharedCore,
    "merge-and-redraw": MergeAndRedraw,
    "norm-clipping": NormClipping,
    "trimmed-mean": TrimmedMean,
    "coordinate-median": CoordinateMedian,
    "staleness-weights": StalenessWeights,
    "client-privacy": ClientPrivacy,
}
