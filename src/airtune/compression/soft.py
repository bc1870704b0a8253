"""SOFT: whole rank components are sent or dropped, by the norms of their two halves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from airtune.compression.rows import (
    Block,
    Fill,
    Mask,
    RowCoder,
    check_fill,
    check_keep_ratio,
    kept_count,
    largest,
    paired_blocks,
)
from airtune.compression.values import FloatingPoint, ValueCoder
from airtune.errors import InputError, unknown_name
from airtune.lora import Adapter, AdapterShape, AdapterSlice, LoraFactors
from airtune.types import LocalTraining, OrthogonalityPenalty, Payload

if TYPE_CHECKING:
    from torch import Tensor

Importance = Literal["product", "sum", "change"]
Scope = Literal["slot", "pooled"]
OrthogonalityForm = Literal["cosine", "off-diagonal", "identity", "mixed"]
FORMS: tuple[OrthogonalityForm, ...] = ("cosine", "off-diagonal", "identity", "mixed")
_IMPORTANCE: tuple[Importance, ...] = ("product", "sum", "change")


@dataclass(frozen=True)
class Soft:
    """Keep the components with the largest ``||b_i|| ||a_i||``; A and B of a slot share the mask (arXiv 2505.00333).

    If the columns of B and the rows of A are orthogonal, these products are the singular values of B A, and keeping
    the largest is the best approximation of that rank (Eckart-Young); if only one factor is, the squared error is
    still the sum of the squares that were dropped. The training's `OrthogonalityPenalty` brings the factors close to
    that. Per round a client does O(r (in + out)) work and a sort of r numbers per slot: neither the product B A
    (r in out) nor an SVD (in out min(in, out)) is formed.

    Payload: the chosen rows of A and columns of B, one bit a component for the mask, and the extras in fp32.

    Parameters
    ----------
    keep_ratio : s in (0, 1]; a slot of r components sends max(1, floor(s r + 1e-6)) of them.
    fill : "hold": changes are sent, and what is not sent does not change (default); "zero": values are sent, and what
        is not sent is zero, which reads the paper as a truncated SVD. Both are our readings [choice].
    importance : "product" of the norms after training; their "sum"; or the Frobenius norm of the "change" of the
        component, sqrt(||b||^2 ||a||^2 + ||b0||^2 ||a0||^2 - 2 (b . b0)(a . a0)), with b0, a0 from the server.
    scope : "slot": the same share of every slot; "pooled": the most important of the whole adapter, in no more bits.
    values : how the numbers are written; `Stochastic(4)` makes SOFT with quantisation.
    """

    keep_ratio: float = 0.5
    fill: Fill = "hold"
    importance: Importance = "product"
    scope: Scope = "slot"
    values: ValueCoder = field(default_factory=FloatingPoint)

    def __post_init__(self) -> None:
        """Check ranges and names."""
        check_keep_ratio(self.keep_ratio)
        check_fill(self.fill)
        if self.importance not in _IMPORTANCE:
            raise unknown_name("compressor.importance", self.importance, _IMPORTANCE)
        if self.scope not in ("slot", "pooled"):
            raise unknown_name("compressor.scope", self.scope, ("slot", "pooled"))

    @property
    def drops_components(self) -> bool:
        """Return True: what is dropped, and what the norms say of it, is measured (`drop_reports`)."""
        return True

    def bits(self, send: AdapterSlice, shape: AdapterShape) -> int:
        """Return the bits of the payload; exact but for "pooled" with slots of several sizes, where it is a bound."""
        return self._coder(send, shape).size_bits(send, shape)

    def encode(
        self,
        send: AdapterSlice,
        trained: Adapter,
        start: Adapter,
        memory: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[Payload, Mapping[str, Tensor]]:
        """Return the chosen components; the memory stays as it is."""
        coder = self._coder(send, start.shape)
        scores = [
            importance(trained.factors[block.keys[0][0]], start.factors[block.keys[0][0]], self.importance)
            for block in coder.blocks
        ]
        if self.scope == "pooled":
            masks = _pooled(scores, coder.blocks, coder.counts)
        else:
            masks = [largest(score, count) for score, count in zip(scores, coder.counts, strict=True)]
        return coder.write(send, trained, start, masks, rng), memory

    def decode(self, send: AdapterSlice, payload: Payload, start: Adapter) -> Adapter:
        """Return the fill with the components that were sent."""
        return self._coder(send, start.shape).read(send, payload, start)

    def _coder(self, send: AdapterSlice, shape: AdapterShape) -> RowCoder:
        blocks = paired_blocks(send, shape)
        return RowCoder(blocks, [kept_count(block.rows, self.keep_ratio) for block in blocks], self.fill, self.values)


def importance(trained: LoraFactors, start: LoraFactors, kind: Importance = "product") -> NDArray[np.float64]:
    """Return the importance of each component, [rank], from norms and inner products of single rows and columns."""
    b, a = trained.B.detach().double(), trained.A.detach().double()
    if kind == "sum":
        return (b.norm(dim=0) + a.norm(dim=1)).cpu().numpy()
    if kind == "product":
        return (b.norm(dim=0) * a.norm(dim=1)).cpu().numpy()
    b0, a0 = start.B.detach().double(), start.A.detach().double()
    # b a' - b0 a0' = (b - b0) a' + b0 (a - a0)': the same value as the formula above without its cancellation.
    db, da = b - b0, a - a0
    square = (db.square().sum(0) * a.square().sum(1)) + (b0.square().sum(0) * da.square().sum(1))
    square = square + 2.0 * (db * b0).sum(0) * (a * da).sum(1)
    return square.clamp_min(0.0).sqrt().cpu().numpy()


def _pooled(scores: Sequence[NDArray[Any]], blocks: Sequence[Block], counts: Sequence[int]) -> list[Mask]:
    """Return masks of the largest scores of all blocks, as long as their values fit into what `counts` would take."""
    budget = sum(block.width * count for block, count in zip(blocks, counts, strict=True))
    masks = [np.zeros(block.rows, dtype=np.bool_) for block in blocks]
    entries = [(-float(s), b, i) for b, score in enumerate(scores) for i, s in enumerate(score)]
    for _, b, i in sorted(entries):
        if blocks[b].width <= budget:
            masks[b][i] = True
            budget -= blocks[b].width
    return masks


def orthogonalized(training: LocalTraining, weight: float, form: OrthogonalityForm) -> LocalTraining:
    """Return the training with SOFT's penalty added; the same training for weight 0."""
    if weight == 0.0:
        return training
    return replace(training, penalties=(*training.penalties, OrthogonalityPenalty(weight, form)))


def check_orthogonality(weight: float, form: str) -> None:
    """Raise InputError unless weight and form are possible."""
    if not 0.0 <= weight < math.inf:
        raise InputError(f"method.orthogonality_weight: {weight} is not possible; valid: at least 0")
    if form not in FORMS:
        raise unknown_name("method.orthogonality", form, FORMS)
