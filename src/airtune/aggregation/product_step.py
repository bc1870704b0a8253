"""The server's optimizer for rules that draw their adapter anew every round, or take its basis from an SVD.

The factors of such a rule have no change that a later round could go on with; the product has. With the change of a
module's weight in a round, ``D_t`` = (merged + adapter) after - before,

    m_t = b1 m_{t-1} + (1 - b1) D_t,    weight_t = weight_{t-1} + eta_t m_t,

where ``eta_t`` is the learning rate, divided by ``sqrt(v_t) + tau`` under an adaptive rule; v_t is one number for each
module, from the mean of the squares of D_t's values, which its factors give.

The rule's own adapter stays as it is, and ``eta_t m_t - D_t`` is merged into the base beside it. Everything is
factored, dense once the summed rank reaches the layer's size, as merges are (`airtune.lora.merge`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from airtune.aggregation.merging import factor_bits
from airtune.aggregation.server_optimizer import Moment, ServerStep
from airtune.lora import Adapter, DenseUpdate, LoraFactors, MergedUpdate, merge
from airtune.types import ServerModel

if TYPE_CHECKING:
    from torch import Tensor


def step_on_products(
    step: ServerStep, before: ServerModel, after: ServerModel, moment: Moment
) -> tuple[ServerModel, Moment]:
    """Return the model after a step along the change of the products, and the new moments.

    The head takes the step on its own values. What has to be merged beyond the rule's merges is charged to clients as
    such: its factors, or the dense update where that is less [choice; clients that hold every merge could compute it].

    Parameters
    ----------
    step : whose rule is "momentum", or whose second moment is one of each tensor.
    before, after : around the method's own aggregation.
    """
    base, bits = dict(after.base_update), 0
    kept, squares = dict[str, "Tensor"](), dict[str, "Tensor"]()
    for module in after.adapter.placement:
        change, old, share = _change(before, after, module), _stored(moment, module), 1.0 - step.beta1
        if (first := _sum(_scaled(old, step.beta1), _scaled(change, share))) is not None:
            kept |= _tensors(module, first)
        second = step.second(moment.second.get(f"product/{module}"), _mean_square(change))
        if step.rule != "momentum":
            squares[f"product/{module}"] = second
        rate = step.learning_rate / float(step.divisor(second))
        missing = _sum(_scaled(old, rate * step.beta1), _scaled(change, rate * share - 1.0))
        if missing is not None:
            base[module] = _merged(base.get(module), missing)
            bits += factor_bits({module: _factors(missing)})
    heads, head_moment = step(_head(before.adapter), _head(after.adapter), moment)
    charged = {**after.merged_bits, after.version: after.merged_bits.get(after.version, 0) + bits}
    adapter = replace(after.adapter, extras=heads.extras)
    model = replace(after, adapter=adapter, base_update=base, merged_bits=charged if bits else after.merged_bits)
    return model, Moment({**kept, **head_moment.first}, {**squares, **head_moment.second})


def _mean_square(change: MergedUpdate | None) -> Tensor:
    """Return the mean of the squares of a product's values, double, without forming a factored one."""
    import torch

    if change is None:
        return torch.zeros((), dtype=torch.float64)
    if isinstance(change, DenseUpdate):
        return change.matrix.double().square().mean()
    norm = change.frobenius_norm()
    return torch.tensor(norm**2 / (change.in_features * change.out_features), dtype=torch.float64)


def _change(before: ServerModel, after: ServerModel, module: str) -> MergedUpdate | None:
    """Return how a module's weight changed: what was merged, and the present adapter in place of the earlier one."""
    old, new = before.base_update.get(module), after.base_update.get(module)
    total: MergedUpdate | None = None
    if isinstance(new, LoraFactors) and not isinstance(old, DenseUpdate):  # a merge stacks behind what is there
        total = new.select(np.arange(0 if old is None else old.rank, new.rank))
    elif new is not None:
        total = DenseUpdate(new.product() if old is None else new.product() - old.product().to(new.product()))
    for adapter, sign in ((after.adapter, 1.0), (before.adapter, -1.0)):
        for slot in adapter.placement[module]:
            factors = adapter.factors[slot].at_least_single()
            if factors.B.any() and factors.A.any():
                total = _sum(total, _scaled(factors, sign))
    return total


def _sum(one: MergedUpdate | None, other: MergedUpdate | None) -> MergedUpdate | None:
    if one is None or other is None:
        return other if one is None else one
    return _merged(one, other)


def _merged(one: MergedUpdate | None, other: MergedUpdate) -> MergedUpdate:
    if isinstance(other, LoraFactors):
        return merge(one, other)
    return other if one is None else DenseUpdate(other.matrix + one.product().to(other.matrix))


def _scaled(update: MergedUpdate | None, weight: float) -> MergedUpdate | None:
    if update is None or weight == 0.0:
        return None
    if isinstance(update, DenseUpdate):
        return DenseUpdate(weight * update.matrix)
    return replace(update, scaling=weight * update.scaling)


def _factors(update: MergedUpdate) -> LoraFactors:
    return update.factors() if isinstance(update, DenseUpdate) else update


def _head(adapter: Adapter) -> Adapter:
    return replace(adapter, factors={}, placement={}, layer={})


def _stored(moment: Moment, module: str) -> MergedUpdate | None:
    """Return a module's momentum, which the moments hold as plain tensors, so that a checkpoint can."""
    if f"product/{module}" in moment.first:
        return DenseUpdate(moment.first[f"product/{module}"])
    if f"product-A/{module}" not in moment.first:
        return None
    return LoraFactors(moment.first[f"product-A/{module}"], moment.first[f"product-B/{module}"], 1.0)


def _tensors(module: str, update: MergedUpdate) -> dict[str, Tensor]:
    if isinstance(update, DenseUpdate):
        return {f"product/{module}": update.matrix}
    inner = update.A if update.core is None else update.core @ update.A
    return {f"product-A/{module}": update.scaling * inner, f"product-B/{module}": update.B}
