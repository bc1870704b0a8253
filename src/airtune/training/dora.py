"""DoRA (Liu et al., ICML 2024, arXiv 2402.09353) inside one layer, and as something that a federation can average.

On a client: with ``V = W0 + s B A`` the layer computes ``diag(mu / c) V x``, where mu, [out], is trained and c are the
norms of V's rows, which get no gradient (section 4.3 of the paper).

Between clients: that product of three trained things is not linear in them, and averages of A, B and mu are far from
the average of the weights. With the gains ``rho = mu / c`` the same weight is ``diag(rho) W0 + s (diag(rho) B) A``,
which is linear in rho and in the product of the other two. So rho travels in place of mu, as an extra tensor that every
aggregator averages plainly, and diag(rho) B in place of B: whatever an aggregator does exactly for LoRA it does exactly
for DoRA, without knowing the base weights [our choice; the values sent are as many]. The client goes back and forth.

What the client holds but does not train, and what was merged into the base, is added outside of the decomposition
[our choice]. Where B is not trained the gains are fixed, too. A row of W0 that is zero has no norm to decompose: it is
trained as plain LoRA, and its gain stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from airtune.lora import LoraFactors


@dataclass
class RowGain:
    """The gains of one layer's rows during one client's activity.

    Attributes
    ----------
    slot : of the layer; with DoRA it has the module's name.
    weight : [out, in], the base weight; frozen.
    factors : of V; its tensors are leaves of the network. None: the gains are fixed.
    magnitude : [out], mu, a leaf; or the gains themselves if they are fixed.
    received : [out], the gains that came from the server.
    """

    slot: str
    weight: Tensor
    factors: LoraFactors | None
    magnitude: Tensor
    received: Tensor
    now: Tensor | None = None

    def compute(self) -> Tensor:
        """Return the present gains, [out], and keep them for the other half of the layer."""
        if self.factors is None:
            self.now = self.magnitude
        else:
            norms = row_norms(self.weight, self.factors)
            plain = self.weight.detach().square().sum(dim=1) == 0
            self.now = torch.where(plain, self.received, self.magnitude / torch.where(plain, 1.0, norms))
        return self.now


def row_norms(weight: Tensor, factors: LoraFactors) -> Tensor:
    """Return the norms of the rows of ``W0 + s B A``, [out], without gradients and without that matrix.

    ``|W0_i|^2 + 2 s sum_j (W0 A')_ij B_ij + s^2 sum_j (B A A')_ij B_ij``, in the factors' precision.
    """
    with torch.no_grad():
        a, b = factors.A, factors.B
        base = weight.to(a.dtype)
        squares = base.square().sum(dim=1)
        squares = squares + 2 * factors.scaling * ((base @ a.T) * b).sum(dim=1)
        squares = squares + factors.scaling**2 * ((b @ (a @ a.T)) * b).sum(dim=1)
        return squares.clamp(min=0.0).sqrt()


def decomposed(weight: Tensor, factors: LoraFactors, gain: Tensor) -> tuple[LoraFactors, Tensor]:
    """Return the factors of V and the magnitudes, given what the server sends: (A, diag(rho) B) and rho."""
    inner = replace(factors, B=factors.B / gain[:, None])
    return inner, gain * row_norms(weight, inner)


class ScaledRows(nn.Module):
    """``diag(rho) B x`` where PEFT expects B. The base layer, which PEFT calls first, has computed rho."""

    def __init__(self, columns: nn.Module, gain: RowGain) -> None:
        """Put the layer of B and its gains into the module."""
        super().__init__()
        self.columns = columns
        self.gain = gain

    @property
    def weight(self) -> Any:
        """Return B: PEFT reads its type."""
        return self.columns.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of B x times their gains."""
        assert self.gain.now is not None
        return self.columns(x) * self.gain.now


def scale_base(gain: RowGain, layer: nn.Module, output: Tensor) -> Tensor:
    """Return ``diag(rho) W0 x + bias`` given the output ``W0 x + bias`` of the base layer."""
    bias: Tensor | None = layer.bias  # pyright: ignore[reportAssignmentType]
    rho = gain.compute()
    scaled = output * rho if bias is None else (output - bias) * rho + bias
    return scaled.to(output.dtype)
