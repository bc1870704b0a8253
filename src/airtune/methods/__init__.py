"""The methods by name. Each is one file here, or comes from another installed package.

A package adds a method through the entry-point group ``airtune.methods``:

    [project.entry-points."airtune.methods"]
    my-method = "my_package.my_module:MyMethod"

Nothing is imported until it is asked for; asking for names, summaries and citations imports neither torch nor
transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from airtune.errors import InputError, unknown_name

ENTRY_POINT_GROUP = "airtune.methods"

_BUILT_IN: Mapping[str, str] = {
    "adaptive-sampling": "airtune.methods.adaptive_sampling:AdaptiveSampling",
    "composed": "airtune.methods.composed:Composed",
    "deadline": "airtune.methods.wrappers:Deadline",
    "fed-sb": "airtune.methods.fed_sb:FedSB",
    "fedadapter": "airtune.methods.fedadapter:FedAdapter",
    "fedbuff": "airtune.methods.fedbuff:FedBuff",
    "fedex-lora": "airtune.methods.fedex_lora:FedExLoRA",
    "fedit": "airtune.methods.fedit:FedIT",
    "fedra": "airtune.methods.fedra:FedRA",
    "fedopt": "airtune.methods.fedopt:FedOpt",
    "fedsa-lora": "airtune.methods.fedsa_lora:FedSALoRA",
    "fedsvd": "airtune.methods.fedsvd:FedSVD",
    "ffa-lora": "airtune.methods.ffa_lora:FFALoRA",
    "first-arrivals": "airtune.methods.wrappers:FirstArrivals",
    "flexlora": "airtune.methods.flexlora:FlexLoRA",
    "flora": "airtune.methods.flora:FLoRA",
    "florist": "airtune.methods.florist:FLoRIST",
    "fslora": "airtune.methods.fslora:FSLoRA",
    "galore-avg": "airtune.methods.galore_avg:GaLoreAverage",
    "hetlora": "airtune.methods.hetlora:HetLoRA",
    "hierfedlora": "airtune.methods.hierfedlora:HierFedLoRA",
    "legend": "airtune.methods.legend:Legend",
    "lora-fair": "airtune.methods.lora_fair:LoRAFair",
    "mole": "airtune.methods.mole:MoLE",
    "rac-lora": "airtune.methods.rac_lora:RACLoRA",
    "rolora": "airtune.methods.rolora:RoLoRA",
    "soft": "airtune.methods.soft:SoftLoRA",
    "staleness": "airtune.methods.wrappers:Staleness",
    "tsfa": "airtune.methods.tsfa:TSFA",
}


@dataclass(frozen=True)
class MethodInfo:
    """What `airtune methods` shows of one method.

    Attributes
    ----------
    name : kebab-case, as on the command line.
    summary : first line of the docstring.
    arxiv : id of the paper, or "" without one.
    package : distribution that brings it.
    """

    name: str
    summary: str
    arxiv: str
    package: str


def built_in_names() -> tuple[str, ...]:
    """Return the names of airtune's own methods, sorted."""
    return tuple(sorted(_BUILT_IN))


def method_names() -> tuple[str, ...]:
    """Return all names, sorted. Raises InputError if two packages claim one name."""
    return tuple(sorted([*_BUILT_IN, *_installed()]))


def method_class(name: str) -> type[Any]:
    """Return the class of a method; ``-`` and ``_`` are equal.

    Raises
    ------
    InputError : no such name (the message lists the valid ones), or a package that cannot be loaded.
    """
    key = name.replace("_", "-")
    if key in _BUILT_IN:
        module, _, attribute = _BUILT_IN[key].partition(":")
        return cast("type[Any]", getattr(import_module(module), attribute))
    installed = _installed()
    if key not in installed:
        raise unknown_name("method", name, [*_BUILT_IN, *installed])
    return _load(installed[key])


def describe() -> tuple[MethodInfo, ...]:
    """Return name, summary, paper and package of every method, sorted by name."""
    installed = _installed()
    return tuple(_info(name, installed) for name in method_names())


def cite(name: str) -> str:
    """Return the BibTeX of a method's paper. Raises InputError for an unknown method or one without a paper."""
    citation = str(getattr(method_class(name), "citation", ""))
    if not citation:
        cited = [info.name for info in describe() if info.arxiv]
        raise InputError(f"method: {name} has no paper of its own; valid: {', '.join(cited)}")
    return citation


def _info(name: str, installed: Mapping[str, EntryPoint]) -> MethodInfo:
    kind = method_class(name)
    package = "airtune" if name in _BUILT_IN else _distribution(installed[name])
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    return MethodInfo(name, summary, str(getattr(kind, "arxiv", "")), package)


def _installed() -> dict[str, EntryPoint]:
    """Return the entry points of other packages by name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        name = point.name.replace("_", "-")
        if name in _BUILT_IN:
            raise InputError(f"method: {_distribution(point)} claims the name {name!r}, which airtune itself uses")
        if name in found and found[name].value != point.value:
            raise InputError(f"method: {_distribution(found[name])} and {_distribution(point)} both claim {name!r}")
        found[name] = point
    return found


def _load(point: EntryPoint) -> type[Any]:
    try:
        kind: object = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"method: {point.name!r} of {_distribution(point)} cannot be loaded: {error}") from error
    wanted = ("init", "plan", "aggregate")
    if not (isinstance(kind, type) and is_dataclass(kind) and all(hasattr(kind, member) for member in wanted)):
        raise InputError(
            f"method: {point.name!r} of {_distribution(point)} is not a method; "
            f"valid: a frozen dataclass with {', '.join(wanted)}"
        )
    return kind


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package"
