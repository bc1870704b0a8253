"""Terms that methods add to a client's loss. Each has a finite value and gradient where B is zero.

No term forms B A: the tail costs two norms per slot, orthogonality two [rank, rank] Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from airtune.training.model import ActiveAdapter
from airtune.training.mole import balance
from airtune.types import BalancePenalty, OrthogonalityPenalty, Penalty, ProximalPenalty, TailPenalty

TINY = 1e-8  # added to squared norms, so that the cosine of a zero column is 0 (our choice)


def penalty_value(penalties: Sequence[Penalty], active: ActiveAdapter) -> Tensor | None:
    """Return the sum of all terms at the client's present values, or None without any."""
    terms = [_term(penalty, active) for penalty in penalties]
    return torch.stack(terms).sum() if terms else None


def tail_norm(penalty: TailPenalty, active: ActiveAdapter) -> Tensor:
    """Return ``sum over slots of ||B[:, t:]||_F ||A[t:, :]||_F`` (HetLoRA, arXiv 2401.06432; no scaling, no weight).

    A component belongs to the tail by its index in the adapter, whatever its place in the client's slice.
    """
    norms: list[Tensor] = []
    for slot, start in penalty.start.items():
        if slot in active.adapter.factors:
            factors = active.adapter.factors[slot]
            tail = torch.as_tensor(active.slice.components[slot] >= start, device=factors.A.device)
            norms.append(torch.linalg.vector_norm(factors.B[:, tail]) * torch.linalg.vector_norm(factors.A[tail]))
    return _sum(norms, active)


def proximal_distance(active: ActiveAdapter) -> Tensor:
    """Return ``||x - x_received||^2 / 2`` over everything that is trained (FedProx, arXiv 1812.06127)."""
    start = {(owner, kind): tensor for owner, kind, tensor in active.start.tensors()}
    start |= {(name, "magnitude"): tensor for name, tensor in active.start.extras.items() if name in active.gains}
    start |= {(slot, "gate"): torch.zeros_like(gate.logits) for slot, gate in active.gates.items()}
    squares = [(tensor - start[owner, kind].to(tensor)).square().sum() for owner, kind, tensor in active.trained()]
    return _sum(squares, active) / 2


def orthogonality(form: str, active: ActiveAdapter) -> Tensor:
    """Return ``sum over slots of Pen(B) + Pen(A')`` (SOFT, arXiv 2505.00333), where the columns are the components.

    With the Gram matrix G of the columns, Pen is the sum of squares of: the cosines G_ij / sqrt(G_ii G_jj), i != j
    ("cosine"); G off its diagonal ("off-diagonal"); G - I ("identity"); "mixed" is off-diagonal on B, identity on A.
    """
    on_b, on_a = ("off-diagonal", "identity") if form == "mixed" else (form, form)
    terms: list[Tensor] = []
    for factors in active.adapter.factors.values():
        terms += [_gram_penalty(factors.B.T @ factors.B, on_b), _gram_penalty(factors.A @ factors.A.T, on_a)]
    return _sum(terms, active)


def _gram_penalty(gram: Tensor, form: str) -> Tensor:
    diagonal = gram.diagonal()
    if form == "identity":
        return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()
    squares = (gram - torch.diag(diagonal)).square()
    if form == "off-diagonal":
        return squares.sum()
    return (squares / ((diagonal[:, None] + TINY) * (diagonal[None, :] + TINY))).sum()


def _term(penalty: Penalty, active: ActiveAdapter) -> Tensor:
    match penalty:
        case TailPenalty():
            return penalty.weight * tail_norm(penalty, active)
        case ProximalPenalty():
            return penalty.weight * proximal_distance(active)
        case OrthogonalityPenalty():
            return penalty.weight * orthogonality(penalty.form, active)
        case BalancePenalty():
            return penalty.weight * (balance(active.routers) if active.routers else _sum([], active))


def _sum(terms: Sequence[Tensor], active: ActiveAdapter) -> Tensor:
    if terms:
        return torch.stack(list(terms)).sum()
    return next((tensor for _, _, tensor in active.adapter.tensors()), torch.zeros(())).new_zeros(())
