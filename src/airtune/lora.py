"""The one place that knows what LoRA is: factors, adapters, and slices of adapters.

An adapted layer computes ``W x + scaling * B (A x)`` with A of shape [rank, in_features] and B of shape
[out_features, rank]. Component i is the pair (row i of A, column i of B). Nobody outside this module multiplies B
by A, knows what alpha divided by the rank is, or reads a meaning out of a parameter's name: most errors in public
federated LoRA code are a scale that is forgotten or applied twice, a transposed product, or a mask that never matches
a name.

Tensors are torch tensors, or numpy arrays where only shapes matter (planning imports no torch).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Factor = Literal["A", "B"]
Indices = NDArray[np.int64]
BOTH: frozenset[Factor] = frozenset({"A", "B"})


@dataclass(frozen=True)
class LoraFactors:
    """One low-rank update of one weight: ``delta W = scaling * B @ (core or I) @ A``.

    Attributes
    ----------
    A : [rank, in_features].
    B : [out_features, rank].
    scaling : the one factor in front of the product (alpha / rank, alpha / sqrt(rank), times rank / kept of a sketch).
    core : [rank, rank] or None (Fed-SB trains only this).
    """

    A: Tensor
    B: Tensor
    scaling: float
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return the number of components."""
        return int(self.A.shape[0])

    @property
    def in_features(self) -> int:
        """Return the length of a row of A."""
        return int(self.A.shape[1])

    @property
    def out_features(self) -> int:
        """Return the length of a column of B."""
        return int(self.B.shape[0])

    def product(self) -> Tensor:
        """Return the dense update, [out_features, in_features]: for tests and small layers, no device needs it."""
        inner = self.A if self.core is None else self.core @ self.A
        return self.scaling * (self.B @ inner)

    def select(self, components: Indices, scaling: float | None = None) -> LoraFactors:
        """Return the factors of some components only, with another scaling if one is given."""
        return LoraFactors(
            A=self.A[components],
            B=self.B[:, components],
            scaling=self.scaling if scaling is None else scaling,
            core=None if self.core is None else self.core[components][:, components],
        )

    def component_norms(self) -> Tensor:
        """Return ``||b_i|| ||a_i||`` of each component, [rank], without the scaling: no product is formed."""
        return self.B.norm(dim=0) * self.A.norm(dim=1)

    def frobenius_norm(self) -> float:
        """Return ``||delta W||_F`` from two [rank, rank] Gram matrices: tr((B'B)(AA')) under the root."""
        inner = self.A if self.core is None else self.core @ self.A
        gram = (self.B.T.double() @ self.B.double()) * (inner.double() @ inner.T.double())
        return abs(self.scaling) * math.sqrt(max(float(gram.sum()), 0.0))

    def with_scaling(self, scaling: float) -> LoraFactors:
        """Return factors with the same product and another scaling: the ratio goes into B."""
        return replace(self, B=self.B * (self.scaling / scaling), scaling=scaling)

    def times(self, columns: Tensor) -> Tensor:
        """Return ``delta W @ columns`` for columns of shape [in_features, n], without the dense update."""
        inner = self.A @ columns
        return self.scaling * (self.B @ (inner if self.core is None else self.core @ inner))

    def cast(self, dtype: torch.dtype) -> LoraFactors:
        """Return the same factors in another floating-point type."""
        return LoraFactors(
            A=self.A.to(dtype),
            B=self.B.to(dtype),
            scaling=self.scaling,
            core=None if self.core is None else self.core.to(dtype),
        )

    def at_least_single(self) -> LoraFactors:
        """Return the same factors, in single precision if they are in less."""
        return self.cast(_at_least_single(self.A))

    def truncate(self, rank: int, *, balanced: bool = False) -> LoraFactors:
        """Return the best approximation of at most `rank` components (Eckart-Young), by QR and a small SVD.

        Cost O((in + out) rank^2), no dense product. The singular values go into B (A gets orthonormal rows), or into
        both as square roots if `balanced`. The scaling is kept.
        """
        return self.split(rank, 0.0, balanced=balanced)[0]

    def split(self, rank: int, energy: float = 1.0, *, balanced: bool = False) -> tuple[LoraFactors, LoraFactors]:
        """Return the leading `rank` singular components, and those that follow until `energy` is reached.

        `energy` is the share of ``||delta W||_F^2`` in both parts together: 1 keeps all that is not rounding, so that
        the two products add up to this one. The singular values go into B, or into both factors as square roots if
        `balanced`; the scaling is kept.
        """
        left, singular, right = self.leading(rank, energy)
        head = min(rank, int(singular.shape[0]))
        singular = singular / self.scaling
        parts = slice(0, head), slice(head, None)
        first, rest = (_from_svd(left[:, p], singular[p], right[p], like=self, balanced=balanced) for p in parts)
        return first, rest

    def leading(self, rank: int, energy: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading part of `svd`: at least `rank` directions, and as many as hold the share `energy`.

        Where the dense product is the smaller matrix and few directions are asked for, they come from the leading
        eigenvectors of its Gram matrix, and from an exact SVD inside the subspace that these span.
        """
        if self.rank >= min(self.in_features, self.out_features):
            return _leading_dense(self.cast(_double()).product(), rank, energy)
        left, singular, right = self.svd()
        kept = max(rank, rank_for_energy(singular, energy))
        return left[:, :kept], singular[:kept], right[:kept]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [out, k], singular values [k] and V' [k, in] of the scaled product in double precision.

        k = min(rank, in, out). Below the layer's size: QR of both factors and the SVD of a [rank, rank] core. From
        there on the dense product is the smaller matrix, and its SVD is taken.
        """
        import torch

        if self.rank >= min(self.in_features, self.out_features):
            return _dense_svd(self.cast(_double()).product())
        inner = self.A if self.core is None else self.core @ self.A
        q_left, r_left = torch.linalg.qr(self.B.double())
        q_right, r_right = torch.linalg.qr(inner.double().T)
        u, s, vh = torch.linalg.svd(self.scaling * (r_left @ r_right.T), full_matrices=False)
        return q_left @ u, s, vh @ q_right.T

    def grow(self, rank: int, new_rows: Tensor) -> LoraFactors:
        """Return the same product at a higher rank: `new_rows` [added, in_features] below A, zero columns in B."""
        import torch

        if rank != self.rank + int(new_rows.shape[0]):
            raise ValueError(f"growing from rank {self.rank} to {rank} needs {rank - self.rank} new rows")
        columns = self.B.new_zeros((self.out_features, rank - self.rank))
        return replace(self, A=torch.cat([self.A, new_rows.to(self.A)]), B=torch.cat([self.B, columns], dim=1))


def stack(parts: Sequence[LoraFactors], weights: Sequence[float] | None = None) -> LoraFactors:
    """Return factors whose product is exactly ``sum_k weights[k] * delta W_k``; the ranks add up.

    The weight and the scaling go onto A, on that side only; the stack's own scaling is 1. Half precision becomes single
    before anything is multiplied.
    """
    import torch

    weights = [1.0] * len(parts) if weights is None else weights
    parts = [part.at_least_single() for part in parts]
    inner = [part.A if part.core is None else part.core @ part.A for part in parts]
    rows = [w * part.scaling * a for w, part, a in zip(weights, parts, inner, strict=True)]
    return LoraFactors(A=torch.cat(rows), B=torch.cat([part.B for part in parts], dim=1), scaling=1.0)


@dataclass(frozen=True)
class SlotShape:
    """The size of one slot, known without any tensor.

    Attributes
    ----------
    rank, in_features, out_features : of its factors.
    layer : position of the layer in the network, 0 next to the input. A slot shared by several layers has the lowest.
    modules : names of the modules that use it (one but for shared slots); FLOPs count each, bits count the slot once.
    scaling : the scaling of its factors.
    core : whether there is one.
    """

    rank: int
    in_features: int
    out_features: int
    layer: int
    modules: tuple[str, ...]
    scaling: float = 1.0
    core: bool = False


@dataclass(frozen=True)
class AdapterShape:
    """The sizes of an adapter, known without any tensor: what planners and cost models see.

    Attributes
    ----------
    slots : name of the slot -> its size, in the adapter's order.
    extras : name of an extra tensor (the classifier head) -> its shape.
    num_layers : number of layers of the network, adapted or not.
    """

    slots: Mapping[str, SlotShape]
    extras: Mapping[str, tuple[int, ...]]
    num_layers: int

    @property
    def extra_values(self) -> int:
        """Return the number of values in the extras."""
        return sum(math.prod(shape) for shape in self.extras.values())

    @property
    def max_rank(self) -> int:
        """Return the largest rank of any slot (0 without slots)."""
        return max((slot.rank for slot in self.slots.values()), default=0)

    def in_layer(self, layer: int) -> tuple[str, ...]:
        """Return the names of the slots of one layer."""
        return tuple(name for name, slot in self.slots.items() if slot.layer == layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the adapted layers in increasing order."""
        return tuple(sorted({slot.layer for slot in self.slots.values()}))


@dataclass(frozen=True)
class Adapter:
    """Everything a federation trains: LoRA factors by slot, where they act, and extra tensors.

    Attributes
    ----------
    factors : slot -> factors. A slot is usually one module; a shared slot acts in several.
    placement : module name -> the slots that act there.
    layer : slot -> position of its layer, 0 next to the input.
    num_layers : number of layers of the network.
    extras : name -> tensor, plainly averaged, sent and counted (classifier head, gates).
    """

    factors: Mapping[str, LoraFactors]
    placement: Mapping[str, tuple[str, ...]]
    layer: Mapping[str, int]
    num_layers: int
    extras: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])

    @property
    def shape(self) -> AdapterShape:
        """Return the sizes alone."""
        modules: dict[str, list[str]] = {slot: [] for slot in self.factors}
        for module, slots in self.placement.items():
            for slot in slots:
                modules[slot].append(module)
        return AdapterShape(
            slots={
                name: SlotShape(
                    rank=f.rank,
                    in_features=f.in_features,
                    out_features=f.out_features,
                    layer=self.layer[name],
                    modules=tuple(modules[name]),
                    scaling=f.scaling,
                    core=f.core is not None,
                )
                for name, f in self.factors.items()
            },
            extras={name: tuple(int(n) for n in tensor.shape) for name, tensor in self.extras.items()},
            num_layers=self.num_layers,
        )

    def with_factors(self, factors: Mapping[str, LoraFactors], extras: Mapping[str, Tensor] | None = None) -> Adapter:
        """Return this adapter with other factors (same slots) and, if given, other extras."""
        if set(factors) != set(self.factors):
            raise ValueError("the new factors must cover exactly the slots of the adapter")
        ordered = {name: factors[name] for name in self.factors}
        return replace(self, factors=ordered, extras=self.extras if extras is None else dict(extras))

    def module_product(self, module: str) -> Tensor:
        """Return the dense update of one module, the sum over its slots."""
        products = [self.factors[slot].product() for slot in self.placement[module]]
        return sum(products[1:], start=products[0])

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (owner, kind, tensor): kind is "A", "B", "core" with a slot as owner, or "extra"."""
        for name, factors in self.factors.items():
            for kind, tensor in (("A", factors.A), ("B", factors.B), ("core", factors.core)):
                if tensor is not None:
                    yield name, kind, tensor
        for name, tensor in self.extras.items():
            yield name, "extra", tensor


@dataclass(frozen=True)
class AdapterSlice:
    """What a client receives, trains or sends of an adapter: rank components per slot.

    Truncation is the first r components, depth is no component in some slots, a sketch is a random subset, freezing A
    or B is a flag. One cost function, one codec and one aggregator interface serve them all.

    Attributes
    ----------
    components : slot -> indices of components, increasing; a slot that is not named has none.
    tensors : which factors are trained (or sent); the other one is present but fixed.
    unbiased : a sketch: in the client's forward pass the kept components are scaled by rank / kept, so that the
        expected product over the random subsets is the full product.
    outside : what is not in the slice is "absent" from the client's forward pass (truncation, sketch) or present and
        "frozen" (depth with the global adapter below).
    extras : whether the extra tensors (classifier head) belong to the slice.
    """

    components: Mapping[str, Indices]
    tensors: frozenset[Factor] = BOTH
    unbiased: bool = False
    outside: Literal["absent", "frozen"] = "absent"
    extras: bool = True

    # -- the usual slices ---------------------------------------------------------------------------------------------

    @staticmethod
    def everything(shape: AdapterShape, tensors: frozenset[Factor] = BOTH) -> AdapterSlice:
        """Return the slice that holds the whole adapter."""
        return AdapterSlice({name: _range(slot.rank) for name, slot in shape.slots.items()}, tensors)

    @staticmethod
    def truncation(shape: AdapterShape, rank: int | Mapping[str, int]) -> AdapterSlice:
        """Return the first `rank` components of each slot (one rank, or one by slot; never more than the slot has)."""
        ranks = {name: rank for name in shape.slots} if isinstance(rank, int) else rank
        return AdapterSlice({name: _range(min(ranks.get(name, 0), slot.rank)) for name, slot in shape.slots.items()})

    @staticmethod
    def top_layers(shape: AdapterShape, depth: int, outside: Literal["absent", "frozen"] = "frozen") -> AdapterSlice:
        """Return all components of the last `depth` layers (those next to the output)."""
        lowest = shape.num_layers - depth
        kept = {name: _range(slot.rank) for name, slot in shape.slots.items() if slot.layer >= lowest}
        return AdapterSlice(kept, outside=outside)

    @staticmethod
    def sketch(shape: AdapterShape, kept: int, rng: np.random.Generator) -> AdapterSlice:
        """Return a random-k sketch: `kept` components of each slot, uniform without replacement, one draw per slot.

        A and B of a slot share the subset by construction (arXiv 2501.19389).
        """
        chosen = {
            name: np.sort(rng.choice(slot.rank, size=min(kept, slot.rank), replace=False)).astype(np.int64)
            for name, slot in shape.slots.items()
        }
        return AdapterSlice(chosen, unbiased=True)

    # -- sizes --------------------------------------------------------------------------------------------------------

    def kept(self, slot: str) -> int:
        """Return the number of components of a slot that the slice holds."""
        indices = self.components.get(slot)
        return 0 if indices is None else len(indices)

    def total_components(self) -> int:
        """Return the number of components over all slots."""
        return sum(len(indices) for indices in self.components.values())

    def num_values(self, shape: AdapterShape) -> int:
        """Return the number of values in the slice, extras included; a shared slot counts once."""
        total = shape.extra_values if self.extras else 0
        for name, slot in shape.slots.items():
            k = self.kept(name)
            if k == 0:
                continue
            total += k * (slot.in_features * ("A" in self.tensors) + slot.out_features * ("B" in self.tensors))
            total += k * k * slot.core
        return total

    def lowest_layer(self, shape: AdapterShape) -> int:
        """Return the lowest layer that holds a component; `num_layers` if none does (only the head is left)."""
        layers = (slot.layer for name, slot in shape.slots.items() if self.kept(name))
        return min(layers, default=shape.num_layers)

    def depth(self, shape: AdapterShape) -> int:
        """Return how many layers lie between the output and the lowest layer of the slice, that one included."""
        return shape.num_layers - self.lowest_layer(shape)

    def violations(self, shape: AdapterShape) -> list[str]:
        """Return what is wrong with the slice for an adapter of this shape, one line each."""
        found: list[str] = []
        for name, indices in self.components.items():
            if name not in shape.slots:
                found.append(f"slot {name!r} does not exist")
            elif len(indices) and (
                indices[0] < 0 or indices[-1] >= shape.slots[name].rank or np.any(np.diff(indices) <= 0)
            ):
                found.append(f"slot {name!r}: components must increase within 0..{shape.slots[name].rank - 1}")
        return found

    # -- taking and putting -------------------------------------------------------------------------------------------

    def take(self, adapter: Adapter) -> Adapter:
        """Return the sub-adapter of the slice: its components alone, with the scaling that the client computes with.

        Slots without a component are left out. An unbiased slice multiplies the scaling by rank / kept, here only.
        """
        factors = {name: self._take_slot(name, f) for name, f in adapter.factors.items() if self.kept(name)}
        placement = {module: tuple(s for s in slots if s in factors) for module, slots in adapter.placement.items()}
        return Adapter(
            factors=factors,
            placement={module: slots for module, slots in placement.items() if slots},
            layer={name: adapter.layer[name] for name in factors},
            num_layers=adapter.num_layers,
            extras=dict(adapter.extras) if self.extras else {},
        )

    def _take_slot(self, name: str, factors: LoraFactors) -> LoraFactors:
        kept = self.kept(name)
        gain = factors.rank / kept if self.unbiased else 1.0
        return factors.select(self.components[name], factors.scaling * gain)

    def put(self, adapter: Adapter, values: Adapter) -> Adapter:
        """Return `adapter` with the slice's tensors replaced by those of `values` (in the slice's own coordinates).

        The scaling stays the adapter's own. What is outside the slice is untouched, to the bit.
        """
        factors = dict(adapter.factors)
        for name in self._owned(adapter):
            factors[name] = self._put_slot(name, adapter.factors[name], values.factors[name])
        extras = {**adapter.extras, **values.extras} if self.extras else adapter.extras
        return adapter.with_factors(factors, extras)

    def _put_slot(self, name: str, target: LoraFactors, values: LoraFactors) -> LoraFactors:
        indices = self.components[name]
        a, b, core = target.A, target.B, target.core
        if "A" in self.tensors:
            a = a.clone()
            a[indices] = values.A.to(a)
        if "B" in self.tensors:
            b = b.clone()
            b[:, indices] = values.B.to(b)
        if core is not None and values.core is not None:
            core = core.clone()
            core[np.ix_(indices, indices)] = values.core.to(core)
        return LoraFactors(A=a, B=b, scaling=target.scaling, core=core)

    def complement(self, shape: AdapterShape) -> AdapterSlice:
        """Return the components that are not in the slice, without the extras."""
        rest = {
            name: np.setdiff1d(_range(slot.rank), self.components.get(name, _range(0)))
            for name, slot in shape.slots.items()
        }
        return replace(self, components={n: i for n, i in rest.items() if len(i)}, extras=False, unbiased=False)

    def _owned(self, adapter: Adapter) -> Iterable[str]:
        return (name for name in adapter.factors if self.kept(name))

    def payload(self, values: Adapter) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (owner, kind, tensor) of what this slice trains or sends of a sub-adapter, in a fixed order."""
        for owner, kind, tensor in values.tensors():
            if kind in ("A", "B") and kind not in self.tensors:
                continue
            if kind == "extra" and not self.extras:
                continue
            yield owner, kind, tensor


NEITHER: frozenset[Factor] = frozenset()
ONLY_A: frozenset[Factor] = frozenset({"A"})
ONLY_B: frozenset[Factor] = frozenset({"B"})


@dataclass(frozen=True)
class Exchange:
    """Which factors of its slices a client downloads, trains and uploads; cores and extras go with every slice.

    What a client trains and does not send is its own: it stays on the client from round to round. What it does not
    receive it already knows: from a seed, from an earlier round, or because it is its own.
    """

    receive: frozenset[Factor] = BOTH
    train: frozenset[Factor] = BOTH
    send: frozenset[Factor] = BOTH

    def narrow(
        self, receive: AdapterSlice, train: AdapterSlice, send: AdapterSlice
    ) -> tuple[AdapterSlice, AdapterSlice, AdapterSlice]:
        """Return the three slices with fewer factors: only those that both the slice and the exchange name."""
        return _with_factors(receive, self.receive), _with_factors(train, self.train), _with_factors(send, self.send)


def _with_factors(part: AdapterSlice, factors: frozenset[Factor]) -> AdapterSlice:
    """Return the slice with those factors only; the same object where nothing changes, as tasks share slices."""
    return part if part.tensors <= factors else replace(part, tensors=part.tensors & factors)


_OWN = "own/"


def own_tensors(train: AdapterSlice, send: AdapterSlice, values: Adapter) -> dict[str, Tensor]:
    """Return what a client trains and does not send, by name: it stays in the client's memory (FedSA-LoRA's B).

    values : after training, in the coordinates of `train`.
    """
    kept = [kind for kind in ("A", "B") if kind in train.tensors - send.tensors]
    own = {f"{_OWN}{kind}/{slot}": getattr(f, kind) for slot, f in values.factors.items() for kind in kept}
    if train.extras and not send.extras:
        own.update({f"{_OWN}extra/{name}": tensor for name, tensor in values.extras.items()})
    return own


def with_own(adapter: Adapter, train: AdapterSlice, memory: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter with a client's own tensors, as `own_tensors` named them, in place of the server's."""
    own = {name.removeprefix(_OWN): tensor for name, tensor in memory.items() if name.startswith(_OWN)}
    if not own:
        return adapter
    values = train.take(adapter)
    factors = {
        slot: replace(f, A=own.get(f"A/{slot}", f.A), B=own.get(f"B/{slot}", f.B)) for slot, f in values.factors.items()
    }
    extras = {name: own.get(f"extra/{name}", tensor) for name, tensor in values.extras.items()}
    return train.put(adapter, values.with_factors(factors, extras))


def has_own(memory: Mapping[str, Tensor]) -> bool:
    """Return whether a client's memory holds tensors of its own model."""
    return any(name.startswith(_OWN) for name in memory)


# ------------------------------------------------------------------------------------------------------ merged updates


@dataclass(frozen=True)
class DenseUpdate:
    """An update of one weight without factors, [out_features, in_features]: merges whose rank reached the layer's size.

    It answers the same questions as `LoraFactors`; `factors()` is for a consumer that knows nothing but factors.
    """

    matrix: Tensor

    @property
    def rank(self) -> int:
        """Return the largest rank that a matrix of this size can have."""
        return min(self.in_features, self.out_features)

    @property
    def in_features(self) -> int:
        """Return the number of columns."""
        return int(self.matrix.shape[1])

    @property
    def out_features(self) -> int:
        """Return the number of rows."""
        return int(self.matrix.shape[0])

    def product(self) -> Tensor:
        """Return the update itself."""
        return self.matrix

    def times(self, columns: Tensor) -> Tensor:
        """Return ``delta W @ columns`` for columns of shape [in_features, n]."""
        return self.matrix @ columns

    def factors(self) -> LoraFactors:
        """Return the same update as factors of which the smaller one is the identity."""
        import torch

        eye = torch.eye(self.rank, dtype=self.matrix.dtype, device=self.matrix.device)
        wide = self.in_features <= self.out_features
        return LoraFactors(A=eye if wide else self.matrix, B=self.matrix if wide else eye, scaling=1.0)


MergedUpdate = LoraFactors | DenseUpdate


def merge(merged: MergedUpdate | None, addition: LoraFactors) -> MergedUpdate:
    """Return ``merged + addition`` in single precision (double stays double): stacked factors, dense once that is less.

    It turns dense when the stacked rank reaches min(in, out): from there on further merges need no more memory. Single
    precision whatever the adapter's, because half precision loses most of a small update in rounding.
    """
    parts = [part for part in (merged, addition) if isinstance(part, LoraFactors)]
    dtype = _at_least_single(addition.A)
    if isinstance(merged, DenseUpdate):
        return DenseUpdate(merged.matrix + addition.cast(dtype).product().to(merged.matrix))
    if sum(part.rank for part in parts) >= min(addition.in_features, addition.out_features):
        products = [part.cast(dtype).product() for part in parts]
        return DenseUpdate(sum(products[1:], start=products[0]))
    return stack([part.cast(dtype) for part in parts])


def rank_for_energy(singular: Tensor, energy: float) -> int:
    """Return the smallest p whose first p singular values hold the share `energy` of the sum of squares.

    `energy` 1 keeps all values above rounding (1e-14 of the largest); a zero update needs p = 0.
    """
    squares = singular.double() ** 2
    total = float(squares.sum())
    if not total > 0.0 or energy <= 0.0:
        return 0
    if energy >= 1.0:
        return int((singular > 1e-14 * singular[0]).sum())
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int((~reached).sum()) + 1


def _dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _leading_dense(matrix: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular directions of a dense matrix, see `LoraFactors.leading`."""
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        right, singular, left = _leading_dense(matrix.T, rank, energy)
        return left.T, singular, right.T
    size = int(matrix.shape[0])
    gram = matrix @ matrix.T
    kept = rank
    if energy > 0.0:
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
        kept = max(rank, rank_for_energy(values.sqrt(), energy))
    if kept > size // 4:
        left, singular, right = _dense_svd(matrix)
        kept = max(rank, rank_for_energy(singular, energy))
        return left[:, :kept], singular[:kept], right[:kept]
    from scipy.linalg import eigh

    _, vectors = eigh(gram.numpy(), subset_by_index=(size - kept, size - 1)) if kept else (None, gram.numpy()[:, :0])
    basis = torch.from_numpy(vectors).to(matrix)
    left, singular, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, singular, right


def _double() -> torch.dtype:
    import torch

    return torch.float64


def _from_svd(left: Tensor, singular: Tensor, right: Tensor, *, like: LoraFactors, balanced: bool) -> LoraFactors:
    """Return factors of ``like.scaling * left @ diag(singular) @ right`` in the dtype of `like`."""
    root = singular.abs().sqrt()
    left = left * (root * singular.sign() if balanced else singular)
    right = root[:, None] * right if balanced else right
    return LoraFactors(A=right.to(like.A.dtype), B=left.to(like.B.dtype), scaling=like.scaling)


def is_half(tensor: Tensor) -> bool:
    """Return whether a tensor's type is less precise than single."""
    return _at_least_single(tensor) != tensor.dtype


def _at_least_single(tensor: Tensor) -> torch.dtype:
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool = False) -> float:
    """Return the scaling in front of B A: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def _range(count: int) -> Indices:
    return np.arange(count, dtype=np.int64)
