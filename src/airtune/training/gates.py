"""Names and sizes of MoLE's gates, known without torch: `airtune.training.mole` computes with them."""

from __future__ import annotations

from collections.abc import Mapping

from airtune.errors import InputError
from airtune.lora import SlotShape

_GATE, _TEMPERATURE = ".gate", ".gate_log_temperature"


def check_experts(experts: int, task: str) -> None:
    """Raise InputError unless that many experts can be chosen from, for a task whose texts may be looked at."""
    if experts < 2:
        raise InputError(f"model.experts: {experts} leaves nothing to choose from; valid: 2 or more")
    if task == "causal-lm":
        raise InputError(
            "model.adapter: mole's gates see the whole text, with the tokens that are to be predicted; valid: lora, "
            "rslora, dora, msp-lora, beam-lora"
        )


def gate_names(layer: int) -> tuple[str, str]:
    """Return the names of the extra tensors of a layer's gate: its weight, and the logarithm of its temperature."""
    return f"layer{layer}{_GATE}", f"layer{layer}{_TEMPERATURE}"


def is_gate(name: str) -> bool:
    """Return whether an extra tensor belongs to a gate."""
    return name.endswith((_GATE, _TEMPERATURE))


def expert_name(module: str, expert: int) -> str:
    """Return the name of an expert's slot in a module."""
    return f"{module}.expert{expert}"


def experts_of(placement: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Return slot -> its expert, which is its place among the slots of its module, given all of them."""
    return {slot: expert for slots in placement.values() for expert, slot in enumerate(slots)}


def gated_modules(slots: Mapping[str, SlotShape]) -> dict[int, str]:
    """Return layer -> the module at whose input its gate looks: the first that is adapted."""
    found: dict[int, str] = {}
    for slot in slots.values():
        found.setdefault(slot.layer, slot.modules[0])
    return found


def gate_sizes(slots: Mapping[str, SlotShape], experts: int) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the gates, one for each layer: [experts, experts * out of its first module], and [1]."""
    found: dict[str, tuple[int, ...]] = {}
    for slot in slots.values():
        weight, temperature = gate_names(slot.layer)
        if weight not in found:
            found |= {weight: (experts, experts * slot.out_features), temperature: (1,)}
    return found
