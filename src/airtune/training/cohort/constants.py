"""What a block of clients computes with and does not train: frozen factors, what is held, merges, fixed heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from airtune.lora import Adapter, DenseUpdate, LoraFactors, MergedUpdate
from airtune.training.cohort.linear import Key, Part
from airtune.training.cohort.stacks import stack_of

HELD, MERGED = "held: ", "merged: "


@dataclass
class Constants:
    """Weights without gradients.

    Attributes
    ----------
    shared : key -> [out, in] (or [out]), the same for all clients.
    stacked : key -> [clients, out, in].
    scaling : name -> one number, or [clients, 1, 1].
    like : an empty tensor of the adapter's precision on the model's device.
    """

    like: Tensor
    shared: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    stacked: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    scaling: dict[str, float | Tensor] = field(default_factory=dict[str, float | Tensor])

    def add(self, key: Key, tensors: Sequence[Tensor | None]) -> None:
        """Take one tensor per client; None: the client has none, which counts as zeros."""
        first = tensors[0]
        if first is not None and all(tensor is first for tensor in tensors):
            self.shared[key] = first.detach().to(self.like)
        else:
            self.stacked[key] = stack_of(tensors, self.like)

    def add_scaling(self, name: str, factors: Sequence[LoraFactors | None]) -> None:
        """Take the scaling of each client's factors."""
        known = [f.scaling for f in factors if f is not None]
        if len(set(known)) == 1:
            self.scaling[name] = float(known[0])
        else:
            values = [0.0 if f is None else f.scaling for f in factors]
            self.scaling[name] = self.like.new_tensor(values)[:, None, None]

    def add_held(self, held: Sequence[Adapter]) -> dict[str, list[Part]]:
        """Take what the clients hold and do not train; return module -> its parts."""
        parts: dict[str, list[Part]] = {}
        for slot, modules in _slots_of(held).items():
            factors = [adapter.factors.get(slot) for adapter in held]
            name = HELD + slot
            has_core = any(f is not None and f.core is not None for f in factors)
            self._add_factors(name, factors, core=has_core)
            core = (name, "core") if has_core else None
            for module in modules:
                parts.setdefault(module, []).append(Part((name, "A"), (name, "B"), core, name))
        return parts

    def add_merged(self, updates: Mapping[str, MergedUpdate]) -> dict[str, list[Part]]:
        """Take what was merged into the base; return module -> its part."""
        parts: dict[str, list[Part]] = {}
        for module, update in updates.items():
            name = MERGED + module
            if isinstance(update, DenseUpdate):
                self.shared[name, "A"] = update.matrix.detach().to(self.like)
                parts[module] = [Part((name, "A"), None, None, name)]
            else:
                self._add_factors(name, [update], core=update.core is not None)
                core = (name, "core") if update.core is not None else None
                parts[module] = [Part((name, "A"), (name, "B"), core, name)]
        return parts

    def select(
        self, members: Tensor, change: Callable[[Tensor], Tensor]
    ) -> tuple[dict[Key, Tensor], Mapping[str, float | Tensor]]:
        """Return weights and scalings for some clients, [n] places in the block; `change` casts the weights."""
        weights = {key: change(tensor) for key, tensor in self.shared.items()}
        weights |= {key: change(tensor.index_select(0, members)) for key, tensor in self.stacked.items()}
        scaling = {
            name: value.index_select(0, members) if isinstance(value, Tensor) else value
            for name, value in self.scaling.items()
        }
        return weights, scaling

    def all_of(self, key: Key, clients: int) -> Tensor:
        """Return a weight as [clients, ...], whether it is shared or not."""
        return self.shared[key].expand(clients, *self.shared[key].shape) if key in self.shared else self.stacked[key]

    def _add_factors(self, name: str, factors: Sequence[LoraFactors | None], *, core: bool) -> None:
        self.add((name, "A"), [None if f is None else f.A for f in factors])
        self.add((name, "B"), [None if f is None else f.B for f in factors])
        if core:
            self.add((name, "core"), [None if f is None else f.core for f in factors])
        self.add_scaling(name, factors)


def _slots_of(adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """Return slot -> the modules where it acts, over all adapters."""
    found: dict[str, list[str]] = {}
    for adapter in {id(adapter): adapter for adapter in adapters}.values():
        for module, slots in adapter.placement.items():
            for slot in slots:
                modules = found.setdefault(slot, [])
                if module not in modules:
                    modules.append(module)
    return found
