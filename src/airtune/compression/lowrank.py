"""The best approximation of a client's product of lower rank, by QR and the SVD of a small core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airtune.compression.dense import Dense
from airtune.compression.rows import check_keep_ratio, kept_count
from airtune.compression.values import FloatingPoint, ValueCoder
from airtune.errors import InputError
from airtune.lora import BOTH, NEITHER, Adapter, AdapterShape, AdapterSlice, LoraFactors
from airtune.types import Payload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Send the leading singular components of B A: the least error that a number of components allows.

    The client takes the QR decompositions of both factors and the SVD of their [r, r] core, O(r^2 (in + out)); SOFT
    avoids even that. No index is needed. What arrives are singular components, whose order and basis mean nothing to
    the server's factors, which are averaged separately: the server therefore rotates them onto its own components by
    orthogonal Procrustes, which leaves the product as it was sent [choice].

    Parameters
    ----------
    keep_ratio : s in (0, 1]; of r components max(1, floor(s r + 1e-6)) singular components are sent.
    values : how the numbers are written.
    """

    keep_ratio: float = 0.5
    values: ValueCoder = field(default_factory=FloatingPoint)

    def __post_init__(self) -> None:
        """Check the range."""
        check_keep_ratio(self.keep_ratio)

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the bits of the payload, exactly. Raises InputError where a product cannot be sent."""
        _check(send, shape)
        count = sum(rank * (size_in + size_out) for rank, size_in, size_out in self._sizes(send, shape).values())
        return self.values.size_bits(count) + Dense().bits(replace(send, tensors=NEITHER), shape)

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return the leading singular components; the memory stays as it is."""
        _check(send, start.shape)
        pieces: list[NDArray[Any]] = [np.zeros(0, dtype=np.float32)]
        for slot, (rank, _, _) in self._sizes(send, start.shape).items():
            factors = trained.factors[slot]
            kept = LoraFactors(factors.A.detach(), factors.B.detach(), factors.scaling).truncate(rank, balanced=True)
            pieces += [matrix.cpu().float().numpy().ravel() for matrix in (kept.A, kept.B)]
        dense, _ = Dense().encode(replace(send, tensors=NEITHER), trained, start, {}, rng)
        arrays = {**self.values.pack(np.concatenate(pieces), rng), "rest": dense.arrays["values"]}
        return Payload(arrays, bits=8 * sum(array.nbytes for array in arrays.values())), memory

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return factors whose product is the one that was sent, as near to the server's factors as rotation allows."""
        import torch

        sizes = self._sizes(send, start.shape)
        count = sum(rank * (size_in + size_out) for rank, size_in, size_out in sizes.values())
        values = torch.from_numpy(self.values.unpack(payload.arrays, count))
        rest = Payload({"values": payload.arrays["rest"]}, bits=0)
        base = Dense().decode(replace(send, tensors=NEITHER), rest, start)
        factors = dict(base.factors)
        position = 0
        for slot, (rank, size_in, size_out) in sizes.items():
            middle, end = position + rank * size_in, position + rank * (size_in + size_out)
            a, b = values[position:middle].reshape(rank, size_in), values[middle:end].reshape(size_out, rank)
            factors[slot] = aligned(a, b, start.factors[slot])
            position = end
        return base.with_factors(factors)

    def _sizes(self, send: AdapterSlice, shape: AdapterShape) -> dict[str, tuple[int, int, int]]:
        """Return slot -> components sent, in_features, out_features."""
        return {
            name: (
                min(kept_count(send.kept(name), self.keep_ratio), size.in_features, size.out_features),
                size.in_features,
                size.out_features,
            )
            for name, size in shape.slots.items()
            if send.kept(name)
        }


def aligned(a: Tensor, b: Tensor, like: LoraFactors) -> LoraFactors:
    """Return factors of the product ``b @ a`` with the rank and scaling of `like`, rotated towards its components.

    a : [k, in_features]. b : [out_features, k], k <= rank of `like`. With G [k, rank], G G' = I, the product of b G and
    G' a is that of b and a; G maximises <b G, B> + <G' a, A> and is U V' of the SVD of b' B + a A'.
    """
    import torch

    b, a = b.double(), a.double()
    left, _, right = torch.linalg.svd(b.T @ like.B.double() + a @ like.A.double().T, full_matrices=False)
    rotation = left @ right
    return replace(like, A=(rotation.T @ a).to(like.A), B=(b @ rotation).to(like.B))


def _check(send: AdapterSlice, shape: AdapterShape) -> None:
    if send.tensors != BOTH:
        raise InputError("compressor: low-rank sends products, so both factors must be sent; valid: soft, top-k ...")
    if any(slot.core for name, slot in shape.slots.items() if send.kept(name)):
        raise InputError(
            "compressor: low-rank takes no adapter with a core between its factors; valid: soft, dense ..."
        )
