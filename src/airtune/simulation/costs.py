"""`CostModel`: the one physics that planner, simulator and report ask.

FLOPs are counted from the slices (forward through all layers, backward down to the lowest trained one, no weight
gradient for frozen weights), bits as the compressor serialises them, bytes and joules from the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from airtune.devices.energy import compute_energy
from airtune.devices.latency import Head, TransformerShape, backward_flops, forward_flops, rank_table
from airtune.devices.memory import training_bytes
from airtune.lora import AdapterShape, AdapterSlice
from airtune.types import ClientTask, Fleet, Floats

_Key = tuple[int, int, float, int]  # identities of two slices, tokens, batch size


@dataclass(frozen=True)
class _Known:
    """FLOPs of one row and bytes at the peak of a step; holds the slices, so that their identities stay theirs."""

    train: AdapterSlice
    receive: AdapterSlice
    forward: float
    backward: float
    memory_bytes: float


@dataclass(frozen=True)
class CostModel:
    """What a task costs on a fleet; an `airtune.types.Costs`.

    Attributes
    ----------
    fleet : speeds and energies at the moment.
    shape : of the adapter.
    network : of the base model.
    tokens : [clients], tokens of an average training example of each client (batches are sorted by length, so that
        padding is not trained).
    head : of the model. classes : of the classifier.
    value_bytes : of weights and activations: 4 (fp32) or 2 (bf16).
    linear_bytes : of a weight of the base's linear layers, if those are stored in fewer bits; None: `value_bytes`.
    constant_bytes : memory of everything else on a device (framework, operating system) [our choice].
    """

    fleet: Fleet
    shape: AdapterShape
    network: TransformerShape
    tokens: Floats
    head: Head = "classification"
    classes: int = 2
    value_bytes: int = 4
    linear_bytes: float | None = None
    constant_bytes: float = 0.5e9

    _known: dict[_Key, _Known] = field(default_factory=dict[Any, Any], init=False, repr=False, compare=False)

    def at(self, fleet: Fleet) -> CostModel:
        """Return the same costs on a fleet in other power modes."""
        return replace(self, fleet=fleet)

    def compute_flops(self, task: ClientTask) -> tuple[float, float]:
        """Return the forward and the backward FLOPs of the task's local training, all steps together."""
        steps = task.training.steps(int(self.fleet.num_examples[task.client]))
        rows = steps * self._rows_of_a_step(task)
        one = self._of(task)
        return rows * one.forward, rows * one.backward

    def compute_seconds(self, task: ClientTask) -> float:
        """Return the seconds of local training at the client's current speed."""
        return sum(self.compute_flops(task)) / float(self.fleet.flops_per_second[task.client])

    def compute_joules(self, task: ClientTask) -> float:
        """Return the energy of local training, J."""
        return float(compute_energy(sum(self.compute_flops(task)), self.fleet.energy_per_flop[task.client]))

    def uplink_bits(self, task: ClientTask) -> int:
        """Return the upper bound of the upload, bits."""
        return task.compressor.bits(task.send, self.shape)

    def downlink_bits(self, task: ClientTask) -> int:
        """Return the bits of the `receive` slice in fp32."""
        return 32 * task.receive.num_values(self.shape)

    def broadcast_bits(self, tasks: Sequence[ClientTask]) -> int:
        """Return the bits of a broadcast that holds what any of the tasks receives, each value once."""
        return 32 * _union([task.receive for task in tasks], self.shape).num_values(self.shape)

    def memory_bytes(self, task: ClientTask) -> float:
        """Return the bytes that training needs at its peak."""
        return self._of(task).memory_bytes

    def _rows_of_a_step(self, task: ClientTask) -> float:
        """Return the mean rows of a step: examples are gone through in batches, of which the last is smaller."""
        examples, batch = int(self.fleet.num_examples[task.client]), task.training.batch_size
        return examples / -(-examples // batch) if examples else float(batch)

    def _of(self, task: ClientTask) -> _Known:
        """Return the costs of training, computed once for all clients that share slices, batch size and tokens."""
        examples, length = int(self.fleet.num_examples[task.client]), float(self.tokens[task.client])
        batch = min(task.training.batch_size, examples) if examples else task.training.batch_size
        key = (id(task.train), id(task.receive), length, batch)
        if key not in self._known:
            self._known[key] = self._step_costs(task, length, batch)
        return self._known[key]

    def _step_costs(self, task: ClientTask, length: float, batch: int) -> _Known:
        trained, frozen = self._ranks(task)
        factors = self._factors(task.train)
        forward = forward_flops(
            self.network, trained + frozen, length, 1, self.head, self.classes, core="core" in factors
        )
        backward = backward_flops(
            self.network,
            trained,
            length,
            1,
            self.head,
            self.classes,
            frozen_ranks=frozen,
            factors=factors,
            train_head=task.train.extras,
        )
        needed = training_bytes(
            self.network,
            trained,
            length,
            batch,
            self.head,
            self.classes,
            frozen_ranks=frozen,
            factors=factors,
            value_bytes=self.value_bytes,
            linear_bytes=self.linear_bytes,
            trained_other=self.shape.extra_values if task.train.extras else 0,
            constant=self.constant_bytes,
        )
        return _Known(task.train, task.receive, float(forward), float(backward), float(needed))

    def _ranks(self, task: ClientTask) -> tuple[Floats, Floats]:
        """Return the ranks [layers, kinds] that are trained, and those that are present but frozen."""
        trained = self._table(task.train)
        if task.train.outside == "absent":
            return trained, np.zeros_like(trained)
        return trained, np.maximum(self._table(task.receive) - trained, 0.0)

    def _factors(self, train: AdapterSlice) -> frozenset[str]:
        """Return what has a gradient: the factors of the slice, and the cores where there are any."""
        core = any(slot.core for slot in self.shape.slots.values())
        return frozenset(train.tensors) | ({"core"} if core else frozenset())

    def _table(self, part: AdapterSlice) -> Floats:
        ranks: dict[str, int] = {}
        for slot, size in self.shape.slots.items():
            for module in size.modules:
                ranks[module] = ranks.get(module, 0) + part.kept(slot)
        return rank_table(self.network, ranks)


def _union(parts: Sequence[AdapterSlice], shape: AdapterShape) -> AdapterSlice:
    """Return the slice that holds every component, factor and extra that any of the parts holds."""
    components = {
        slot: np.unique(np.concatenate([part.components[slot] for part in parts if slot in part.components] or [_NONE]))
        for slot in shape.slots
    }
    return AdapterSlice(
        components=components,
        tensors=frozenset(tensor for part in parts for tensor in part.tensors),
        extras=any(part.extras for part in parts),
    )


_NONE = np.empty(0, dtype=np.int64)
