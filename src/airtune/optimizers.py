"""The optimizers of local training: which one, with which numbers. What they compute stands in `airtune.training`.

An experiment names one by ``[training] optimizer = "lora-rite"``, or by a table with its fields,
``[training.optimizer] type = "lora-rite"``. What all of them share (learning rates, weight decay, clipping) are fields
of `airtune.types.LocalTraining`. The state of every optimizer is fresh in each round of each client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from airtune.errors import InputError, unknown_name


@dataclass(frozen=True)
class Moments:
    """The decay rates of running moments, and what keeps their quotient finite.

    beta1, beta2 : of the first and the second moment, from 0 to below 1.
    epsilon : added to the root of the second moment, positive.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse rates with which no step is possible."""
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name}: {getattr(self, name)} is not possible; valid: from 0 to below 1")
        _positive("epsilon", self.epsilon)


@dataclass(frozen=True)
class AdamW(Moments):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on A, B, cores and head."""


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with heavy-ball momentum `LocalTraining.momentum`."""


@dataclass(frozen=True)
class LoraPlus(Moments):
    """LoRA+ (Hayou et al., arXiv 2402.12354): AdamW with a learning rate of B that is `ratio` times that of A.

    ratio : lambda of the paper, which recommends 16; positive. `LocalTraining.learning_rate` is that of A.
    """

    ratio: float = 16.0

    def __post_init__(self) -> None:
        """Check the ratio, too."""
        super().__post_init__()
        _positive("ratio", self.ratio)


@dataclass(frozen=True)
class LoraRite(Moments):
    """LoRA-RITE (Yen et al., ICLR 2025, arXiv 2410.20625): the step on B A does not depend on how it is factored.

    Defaults are those of the public code; `epsilon` enters the root of the second moment squared, as there.

    skip_above : a gradient in the basis of its partner whose root mean square is larger is left out of the step.
    clip : limit of the norm of all these gradients of a client together.
    escape : whether the second moment that a change of basis loses is added back. It is in the paper's algorithm and
        off in both public codes.
    """

    epsilon: float = 1e-6
    skip_above: float = 1.0
    clip: float = 1.0
    escape: bool = False

    def __post_init__(self) -> None:
        """Check the limits, too; infinity switches them off."""
        super().__post_init__()
        for name in ("skip_above", "clip"):
            if not getattr(self, name) > 0.0:
                raise InputError(f"{name}: {getattr(self, name)} is not possible; valid: a positive number, or inf")


@dataclass(frozen=True)
class LoraPro(Moments):
    """LoRA-Pro (Wang et al., ICLR 2025, arXiv 2407.18242), efficient mode: gradients of A and B that move B A best.

    The gradients are replaced by those with which the change of ``scaling B A`` comes nearest to the gradient of the
    full weight; AdamW then steps with them. The paper's other mode keeps moments of the size of the base weights.

    damping : added to the eigenvalues of A A' and B' B, in units of the largest; positive [our choice].
    """

    damping: float = 1e-6

    def __post_init__(self) -> None:
        """Check the damping, too."""
        super().__post_init__()
        _positive("damping", self.damping)


@dataclass(frozen=True)
class GaLore(Moments):
    """GaLore (Zhao et al., ICML 2024, arXiv 2403.03507), with one projector per round.

    Descends the full weight along gradients projected on `rank` directions, with AdamW's moments of the projection. The
    projector is the frozen factor of a method that trains one factor only, and its columns must be orthonormal, as
    `galore-avg` draws them; other methods refuse it. The learning rate is that of the full weight: the adapter's
    scaling does not enter. More than one projector in a round would leave the rank of the adapter [our choice].

    With a `rank` of its own it is the paper's dense form, a baseline: at the layer's full rank the method's projector
    is a rotation of the whole space, and gradients are projected again, on their own leading singular directions.

    scale : alpha of the paper, in front of the lifted step; positive.
    rank : of the projection of gradients; None: the adapter's.
    gap : steps from one projection to the next, if `rank` is given; moments stay, as in the public code.
    """

    scale: float = 0.25
    rank: int | None = None
    gap: int = 200

    def __post_init__(self) -> None:
        """Check the numbers, too."""
        super().__post_init__()
        _positive("scale", self.scale)
        _positive("gap", self.gap)
        if self.rank is not None:
            _positive("rank", self.rank)


Optimizer = AdamW | SGD | LoraPlus | LoraRite | LoraPro | GaLore
OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "lora-plus": LoraPlus,
    "lora-rite": LoraRite,
    "lora-pro": LoraPro,
    "galore": GaLore,
}


def as_optimizer(optimizer: Optimizer | str) -> Optimizer:
    """Return the optimizer of a name with its defaults; an optimizer is returned as it is.

    Raises
    ------
    InputError : the name is not known.
    """
    if not isinstance(optimizer, str):
        return optimizer
    name = optimizer.replace("_", "-")
    if name not in OPTIMIZERS:
        raise unknown_name("training.optimizer", optimizer, OPTIMIZERS)
    return OPTIMIZERS[name]()


def _positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise InputError(f"{name}: {value} is not possible; valid: a positive number")
