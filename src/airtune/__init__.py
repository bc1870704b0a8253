"""airtune: federated LoRA fine-tuning that counts seconds, bits and joules.

The names below are the public interface; everything else may change. A name is imported when it is first used, so
``import airtune`` loads neither torch nor scipy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from airtune.version import __version__ as __version__

if TYPE_CHECKING:
    from airtune.aggregation.mean import FrobeniusWeighted, IndependentSampling, Mean
    from airtune.compression.dense import Dense
    from airtune.errors import InputError, NoResultError
    from airtune.federation import Progress, Stop, begin, run
    from airtune.lora import Adapter, AdapterShape, AdapterSlice, LoraFactors, stack
    from airtune.methods import cite, method_class, method_names
    from airtune.methods.composed import Composed
    from airtune.methods.fedbuff import FedBuff
    from airtune.methods.fedit import FedIT
    from airtune.methods.hetlora import HetLoRA
    from airtune.methods.legend import Legend
    from airtune.methods.wrappers import Deadline, FirstArrivals, Staleness
    from airtune.scheduling.planner import Separate
    from airtune.simulation.cell import Cell
    from airtune.simulation.costs import CostModel
    from airtune.simulation.runner import SimulatedRunner
    from airtune.streams import stream, uniform_field
    from airtune.types import (
        ClientTask,
        ClientUpdate,
        Cutoff,
        Fleet,
        Group,
        LocalTraining,
        Method,
        Observation,
        Plan,
        PlanError,
        RoundOutcome,
        RoundRecord,
        ServerModel,
    )
    from airtune.wireless.channel import Channel
    from airtune.wireless.knowledge import ChannelKnowledge

_HOME = {
    "airtune.aggregation.mean": ("FrobeniusWeighted", "IndependentSampling", "Mean"),
    "airtune.compression.dense": ("Dense",),
    "airtune.errors": ("InputError", "NoResultError"),
    "airtune.federation": ("Progress", "Stop", "begin", "run"),
    "airtune.lora": ("Adapter", "AdapterShape", "AdapterSlice", "LoraFactors", "stack"),
    "airtune.methods": ("cite", "method_class", "method_names"),
    "airtune.methods.composed": ("Composed",),
    "airtune.methods.fedbuff": ("FedBuff",),
    "airtune.methods.fedit": ("FedIT",),
    "airtune.methods.hetlora": ("HetLoRA",),
    "airtune.methods.legend": ("Legend",),
    "airtune.methods.wrappers": ("Deadline", "FirstArrivals", "Staleness"),
    "airtune.scheduling.planner": ("Separate",),
    "airtune.simulation.cell": ("Cell",),
    "airtune.simulation.costs": ("CostModel",),
    "airtune.simulation.runner": ("SimulatedRunner",),
    "airtune.streams": ("stream", "uniform_field"),
    "airtune.types": (
        "ClientTask",
        "ClientUpdate",
        "Cutoff",
        "Fleet",
        "Group",
        "LocalTraining",
        "Method",
        "Observation",
        "Plan",
        "PlanError",
        "RoundOutcome",
        "RoundRecord",
        "ServerModel",
    ),
    "airtune.wireless.channel": ("Channel",),
    "airtune.wireless.knowledge": ("ChannelKnowledge",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - by module, as above
    "FrobeniusWeighted",
    "IndependentSampling",
    "Mean",
    "Dense",
    "InputError",
    "NoResultError",
    "Progress",
    "Stop",
    "begin",
    "run",
    "Adapter",
    "AdapterShape",
    "AdapterSlice",
    "LoraFactors",
    "stack",
    "cite",
    "method_class",
    "method_names",
    "Composed",
    "FedBuff",
    "FedIT",
    "HetLoRA",
    "Legend",
    "Deadline",
    "FirstArrivals",
    "Staleness",
    "Separate",
    "Cell",
    "CostModel",
    "SimulatedRunner",
    "stream",
    "uniform_field",
    "ClientTask",
    "ClientUpdate",
    "Cutoff",
    "Fleet",
    "Group",
    "LocalTraining",
    "Method",
    "Observation",
    "Plan",
    "PlanError",
    "RoundOutcome",
    "RoundRecord",
    "ServerModel",
    "Channel",
    "ChannelKnowledge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'airtune' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
