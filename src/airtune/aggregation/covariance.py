"""What averaging A and B separately loses (the covariance of the factors), and how far from orthogonal they are.

With weights p_k that sum to 1 and the means B, A of the factors,

    sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A) =: C

is what the mean of the products has and the product of the means has not. Nothing here forms a matrix of the layer's
size: norms of products come from [rank, rank] Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from airtune.aggregation.mean import Weights, client_weights, in_client_order
from airtune.compression.drop_error import DROP_KEYS
from airtune.lora import Adapter, LoraFactors, stack
from airtune.types import ClientUpdate, Floats, RoundOutcome, ServerModel

if TYPE_CHECKING:
    from torch import Tensor


def covariance_norm(parts: Sequence[LoraFactors], weights: Sequence[float]) -> float:
    """Return ``||C||_F`` of one slot, scalings included.

    With D_k = p_k (B_k - B) and E_k = A_k - A it is the root of sum_jk <D_j' D_k, E_j E_k'>, one client's Gram matrices
    at a time: O((K r)^2 (in + out)) for K clients of rank r, and memory for K r rows and columns.

    Parameters
    ----------
    parts : the factors that arrived, of one shape and scaling. weights : one each, not normalised, not all zero.
    """
    import torch

    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    b = torch.stack([part.B.detach().double() for part in parts])  # [clients, out, rank]
    a = torch.stack([(part.A if part.core is None else part.core @ part.A).detach().double() for part in parts])
    b = (b - torch.tensordot(p, b, dims=1)) * p[:, None, None]
    a = a - torch.tensordot(p, a, dims=1)
    columns = b.permute(1, 0, 2).reshape(b.shape[1], -1)  # [out, clients * rank]
    rows = a.reshape(-1, a.shape[2])  # [clients * rank, in]
    total = sum(float(((bk.T @ columns) * (ak @ rows.T)).sum()) for bk, ak in zip(b, a, strict=True))
    return abs(parts[0].scaling) * float(np.sqrt(max(total, 0.0)))


def coherence(columns: Tensor) -> float:
    """Return the largest |cosine| between two columns, neither zero, of a matrix [size, rank]; 0 without two."""
    lengths = columns.detach().double().norm(dim=0)
    unit = columns.detach().double()[:, lengths > 0] / lengths[lengths > 0]
    if unit.shape[1] < 2:
        return 0.0
    gram = (unit.T @ unit).abs()
    return float(gram.fill_diagonal_(0.0).max())


def factor_diagnostics(outcome: RoundOutcome, weights: Weights = "examples") -> dict[str, float]:
    """Return what the arrived factors of a round show, for `RoundRecord.diagnostics`; nothing without updates.

    ``covariance_norm`` : root of the sum of ``||C||_F^2`` over slots. ``covariance_share`` : its square over the
    weighted mean of the squared norms of the clients' products. ``coherence_a``, ``coherence_b`` : mean over
    clients and slots of the largest |cosine| among rows of A and among columns of B. ``importance_ratio`` : mean of
    the largest over the smallest ``||b_i|| ||a_i||`` where that is finite. ``drop_error``, ``drop_error_predicted``,
    ``drop_error_bound`` : weighted mean of what the clients reported (`airtune.compression.drop_error`), if they did.

    Only slots of which every update holds the same components are compared.
    """
    updates = in_client_order(outcome.updates)
    if not updates:
        return {}
    factors = client_weights(updates, outcome, weights)
    dropped = _reported(updates, factors)
    slots = [name for name in updates[0].values.factors if _comparable(name, updates)]
    if not slots:
        return dropped
    parts = {name: [update.values.factors[name] for update in updates] for name in slots}
    covariance = sum(covariance_norm(parts[name], factors) ** 2 for name in slots)
    total = sum(factors)
    energy = sum(
        p / total * f.frobenius_norm() ** 2 for name in slots for p, f in zip(factors, parts[name], strict=True)
    )
    found = {
        "covariance_norm": float(np.sqrt(covariance)),
        "covariance_share": covariance / energy if energy > 0.0 else 0.0,
        "coherence_a": float(np.mean([coherence(f.A.T) for name in slots for f in parts[name]])),
        "coherence_b": float(np.mean([coherence(f.B) for name in slots for f in parts[name]])),
    }
    ratios = [_ratio(f) for name in slots for f in parts[name]]
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    return found | ({"importance_ratio": float(np.mean(finite))} if finite else {}) | dropped


def _reported(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> dict[str, float]:
    """Return the weighted means of the clients' drop errors; nothing unless all have measured them."""
    if any(key not in update.reports for update in updates for key in DROP_KEYS):
        return {}
    p = np.array(weights) / sum(weights)
    return {key: float(p @ [update.reports[key] for update in updates]) for key in DROP_KEYS}


def tail_energies(adapter: Adapter, rank: int) -> Floats:
    """Return the energy beyond the i largest components of each slot, summed over slots, for i = 0 ... rank.

    The energy of a component is ``(scaling ||b_i|| ||a_i||)^2``. [rank + 1], convex and falling, 0 at the end; a slot
    of fewer components counts at the same share of its own rank, as `Soft` would send it.
    """
    tail = np.zeros(rank + 1)
    for factors in adapter.factors.values():
        norms = factors.component_norms().detach().double().cpu().numpy() * factors.scaling
        falling = np.sort(norms**2)[::-1]
        beyond = np.concatenate([np.cumsum(falling[::-1])[::-1], [0.0]])
        tail += beyond[np.floor(np.arange(rank + 1) / rank * len(falling) + 1e-6).astype(np.int64)]
    return tail


def _comparable(slot: str, updates: Sequence[ClientUpdate]) -> bool:
    first = updates[0].task.send.components.get(slot)
    return first is not None and all(
        np.array_equal(first, update.task.send.components.get(slot, _NOTHING)) for update in updates
    )


_NOTHING = np.zeros(0, dtype=np.int64)


def _ratio(factors: LoraFactors) -> float:
    norms = factors.component_norms().detach().double()
    return float(norms.max() / norms.min()) if float(norms.min()) > 0.0 else float("inf")


@dataclass(frozen=True)
class PilotTerms:
    """What a pilot round says about every candidate rank, all in squared Frobenius norms.

    Attributes
    ----------
    residual : [candidates], energy of the aggregated update beyond its r leading singular components, over all slots.
    covariance : [candidates], ``||C||_F^2`` of the r components that are largest in the mean over clients.
    energies : [largest rank], mean over clients of the squared component norms, each slot sorted, summed over slots.
    """

    residual: Floats
    covariance: Floats
    energies: Floats


def pilot_terms(
    model: ServerModel, averaged: ServerModel, outcome: RoundOutcome, ranks: Sequence[int], weights: Weights
) -> PilotTerms | None:
    """Return the terms of the bound measured in one round; None without updates that hold whole slots.

    model, averaged : before and after the separate average. ranks : candidates. The aggregated update of a slot,
    B' A' - B A, is taken as a stack of two factors, so that its singular values cost O((2r)^2 (in + out)).
    """
    updates = in_client_order(outcome.updates)
    slots = [name for name in model.adapter.factors if updates and _comparable(name, updates)]
    if not slots:
        return None
    factors = client_weights(updates, outcome, weights)
    p = np.array(factors) / sum(factors)
    most = max(model.adapter.factors[name].rank for name in slots)
    residual, covariance, energies = np.zeros(len(ranks)), np.zeros(len(ranks)), np.zeros(most)
    for name in slots:
        parts = [update.values.factors[name] for update in updates]
        change = stack([averaged.adapter.factors[name], model.adapter.factors[name]], [1.0, -1.0])
        squares = np.square(change.svd()[1].cpu().numpy())
        norms = np.array([part.scaling * part.component_norms().detach().double().cpu().numpy() for part in parts])
        order = np.argsort(-(p @ norms**2), kind="stable")
        energies[: norms.shape[1]] += p @ np.sort(norms**2, axis=1)[:, ::-1]
        for index, rank in enumerate(ranks):
            residual[index] += squares[rank:].sum()
            covariance[index] += covariance_norm([part.select(order[:rank]) for part in parts], factors) ** 2
    return PilotTerms(residual, covariance, energies)
