"""Algebra of the server on factors: what averaging leaves out, how B makes up for it, and factors drawn from a seed.

Like everything on the server it forms no dense update; the products themselves belong to `airtune.lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from airtune.lora import LoraFactors

if TYPE_CHECKING:
    from torch import Tensor

RowLaw = Literal["kaiming", "gaussian", "orthonormal"]


def mean_residual(parts: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Return ``sum_k w_k delta W_k - s B_mean A_mean`` with rank (K - 1) r: what averaging the factors leaves out.

    It is the covariance of the factors over the clients, ``sum_{k<K} w_k (B_k - B_mean)(A_k - A_K)``, for weights that
    sum to 1 and factors of one rank, brought to the scaling s of the first part beforehand.

    Raises
    ------
    ValueError : the ranks differ, or the weights do not sum to 1.
    """
    import torch

    if len({part.rank for part in parts}) != 1 or abs(sum(weights) - 1.0) > 1e-9:
        raise ValueError("the residual of a mean needs equal ranks and weights that sum to 1")
    scaling = parts[0].scaling
    left = [(part.B if part.core is None else part.B @ part.core) * (part.scaling / scaling) for part in parts]
    mean = sum((w * b for w, b in zip(weights, left, strict=True)), start=torch.zeros_like(left[0]))
    last = parts[-1].A
    rows = [w * (part.A - last) for w, part in zip(weights[:-1], parts[:-1], strict=True)]
    columns = [b - mean for b in left[:-1]]
    if not rows:
        rows, columns = [last[:0]], [mean[:, :0]]
    return LoraFactors(A=torch.cat(rows), B=torch.cat(columns, dim=1), scaling=scaling)


def ridge_correction(residual: LoraFactors, A: Tensor, strength: float, scaling: float) -> Tensor:
    """Return D = argmin ``||residual - scaling D A||_F^2 + strength scaling^2 ||D||_F^2``, [out_features, rank].

    The closed form ``residual A' (A A' + strength I)^-1 / scaling``: a [rank, rank] solve, no dense update.
    """
    import torch

    gram = A @ A.T + strength * torch.eye(int(A.shape[0]), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(gram, residual.times(A.T).T).T / scaling


def random_rows(rank: int, in_features: int, seed: int, law: RowLaw = "kaiming") -> Tensor:
    """Return a factor A [rank, in_features] that everyone can draw from the seed, on the CPU in single precision.

    law : "kaiming": U(-1/sqrt(in), 1/sqrt(in)), what PEFT draws; "gaussian": variance 1/in; "orthonormal": the rows of
        a Gaussian matrix, orthonormalised (uniform over subspaces), which needs rank <= in_features.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    if law == "kaiming":
        bound = in_features**-0.5
        return torch.empty((rank, in_features)).uniform_(-bound, bound, generator=generator)
    rows = torch.empty((rank, in_features)).normal_(0.0, in_features**-0.5, generator=generator)
    if law == "gaussian":
        return rows
    if rank > in_features:
        raise ValueError(f"{rank} rows of length {in_features} cannot be orthonormal")
    orthonormal, upper = torch.linalg.qr(rows.double().T)
    return (orthonormal * upper.diagonal().sign()).T.float().contiguous()
