"""What dropping components costs a product, and what their sizes alone would say: a client measures both as it codes.

Of a slot, component i of the client's product is b_i a_i and what arrives of it b'_i a'_i, so the error is the sum of
D_i = (b_i - b'_i) a_i + b'_i (a_i - a'_i). The sum of ||D_i||^2 predicts its square, exactly where the D_i are
orthogonal to one another, as they are if either factor is. For n of them with cosines of at most mu it is at most
(1 + mu (n - 1)) times that; under zero fill mu is at most the product of the coherences of A and B. All inner products
come from [2 rank, 2 rank] Gram matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from airtune.lora import Adapter, LoraFactors
from airtune.types import Floats

if TYPE_CHECKING:
    from airtune.types import Compressor

_ROUNDING = 1e-5  # errors of this relative size are those of components that were sent, in fp32
DROP_KEYS = ("drop_error", "drop_error_predicted", "drop_error_bound")


@runtime_checkable
class DropsComponents(Protocol):
    """A codec that sends or drops whole components, so that `drop_error` says something about it."""

    @property
    def drops_components(self) -> bool:
        """Return whether it does, as it is configured."""
        ...


def drops_components(codec: Compressor) -> bool:
    """Return whether a codec says so."""
    return isinstance(codec, DropsComponents) and codec.drops_components


@dataclass(frozen=True)
class DropError:
    """Squared Frobenius norms: the true error of a product, the sum over its components, and the bound."""

    true: float
    predicted: float
    bound: float


def drop_error(trained: LoraFactors, arrived: LoraFactors) -> DropError:
    """Return what arrived differs by from what was trained, in one slot without a core, scalings included."""
    import torch

    scaling = trained.scaling**2
    b, a = trained.B.detach().double(), trained.A.detach().double()
    held_b, held_a = arrived.B.detach().double(), arrived.A.detach().double()
    columns = torch.cat([b - held_b, held_b], dim=1)  # the difference first: no digits are lost where little changed
    rows = torch.cat([a, a - held_a], dim=0)
    gram = ((columns.T @ columns) * (rows @ rows.T)).cpu().numpy()
    r = trained.rank
    inner = scaling * (gram[:r, :r] + gram[:r, r:] + gram[r:, :r] + gram[r:, r:])  # <D_i, D_j>
    size = np.sqrt(np.maximum(np.diag(inner), 0.0))
    return DropError(max(float(inner.sum()), 0.0), float(np.square(size).sum()), _bound(inner, size))


def _bound(inner: Floats, size: Floats) -> float:
    """Return (1 + mu (n - 1)) sum ||D_i||^2 over the n errors that are not rounding, which come on top by their sizes.

    inner : [rank, rank], <D_i, D_j>. size : [rank], ||D_i||.
    """
    wrong = np.flatnonzero(size > _ROUNDING * size.max(initial=0.0))
    cosine = np.abs(inner[np.ix_(wrong, wrong)] / np.outer(size[wrong], size[wrong]))
    np.fill_diagonal(cosine, 0.0)
    square = float(np.square(size[wrong]).sum()) * (1.0 + float(cosine.max(initial=0.0)) * max(len(wrong) - 1, 0))
    return float((np.sqrt(square) + np.delete(size, wrong).sum()) ** 2)


def drop_reports(codec: Compressor, trained: Adapter, arrived: Adapter) -> Mapping[str, float]:
    """Return what a client reports of its coding: the three sums over slots, relative to the energy of its product.

    trained, arrived : in the coordinates of what is sent. Nothing for codecs that do not drop whole components, and for
    slots with a core.
    """
    if not drops_components(codec):
        return {}
    slots = [name for name, factors in trained.factors.items() if factors.core is None and factors.rank]
    energy = sum(trained.factors[name].frobenius_norm() ** 2 for name in slots)
    if not energy > 0.0:
        return {}
    found = [drop_error(trained.factors[name], arrived.factors[name]) for name in slots]
    sums = (sum(e.true for e in found), sum(e.predicted for e in found), sum(e.bound for e in found))
    return dict(zip(DROP_KEYS, (value / energy for value in sums), strict=True))
