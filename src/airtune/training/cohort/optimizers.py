"""The optimizers of `airtune.optimizers` on the stacks of many clients: the same numbers as one client at a time.

Clients stand in the order of their number of steps, so those that still train are the first `active` rows. All of them
have taken the same number of steps before, so bias corrections are one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from airtune.errors import InputError
from airtune.optimizers import SGD, AdamW, GaLore, LoraPlus, LoraPro, LoraRite, Moments, as_optimizer
from airtune.training.beam import UNMOVABLE
from airtune.training.cohort.stacks import Layout, Stacks
from airtune.training.optimizers.groups import head_rate
from airtune.training.optimizers.lora_pro import inverse, pro_gradients
from airtune.training.optimizers.lora_rite import Side, rite_update
from airtune.types import LocalTraining


class StackedOptimizer(Protocol):
    """Changes the values of a block by its gradients."""

    def step(self, active: int) -> None:
        """Step once with the first `active` clients."""
        ...


@dataclass(frozen=True)
class Settings:
    """The clients' own numbers, [clients, 1] each.

    Attributes
    ----------
    rate, head_rate : learning rates of the factors and of the extras. decay : weight decay. momentum : of SGD.
    limit : largest norm of a client's gradient, infinite without clipping.
    """

    rate: Tensor
    head_rate: Tensor
    decay: Tensor
    momentum: Tensor
    limit: Tensor

    @staticmethod
    def of(trainings: Sequence[LocalTraining], like: Tensor) -> Settings:
        """Return the numbers of these clients, on the device of `like` and in its precision."""

        def column(number: Callable[[LocalTraining], float]) -> Tensor:
            return like.new_tensor([number(training) for training in trainings])[:, None]

        return Settings(
            rate=column(lambda t: t.learning_rate),
            head_rate=column(head_rate),
            decay=column(lambda t: t.weight_decay),
            momentum=column(lambda t: t.momentum),
            limit=column(lambda t: math.inf if t.max_grad_norm is None else t.max_grad_norm),
        )

    def spans(self, layout: Layout, ratio: float = 1.0) -> list[tuple[slice, Tensor]]:
        """Return columns and their rate, [clients, 1]; `ratio` is that of B's rate to A's (LoRA+)."""
        a, b, core, gate, extra = (layout.kinds[kind] for kind in ("A", "B", "core", "gate", "extra"))
        if ratio == 1.0:
            found = [(slice(a[0], gate[1]), self.rate)]
        else:
            found = [(slice(*a), self.rate), (slice(*b), ratio * self.rate), (slice(core[0], gate[1]), self.rate)]
        return [(span, rate) for span, rate in [*found, (slice(*extra), self.head_rate)] if span.stop > span.start]


def clip(gradients: Tensor, limit: Tensor) -> None:
    """Scale each client's gradient, a row, down to its largest norm, as `torch.nn.utils.clip_grad_norm_` does."""
    if not bool(torch.isfinite(limit).any()):
        return
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    gradients.mul_(torch.where(torch.isfinite(limit), (limit / (norms + 1e-6)).clamp(max=1.0), 1.0))


@dataclass
class StackedAdamW:
    """AdamW (arXiv 1711.05101) on some columns.

    spans : columns and their learning rate, [clients, 1].
    """

    stacks: Stacks
    spans: Sequence[tuple[slice, Tensor]]
    decay: Tensor
    moments: Moments
    steps: int = 0

    def __post_init__(self) -> None:
        """Begin with moments of zero."""
        self.columns = slice(min(s.start for s, _ in self.spans), max(s.stop for s, _ in self.spans))
        own = self.stacks.values[:, self.columns]
        self.first, self.second = torch.zeros_like(own), torch.zeros_like(own)

    def step(self, active: int) -> None:
        """Step once with the first `active` clients."""
        self.steps += 1
        beta1, beta2 = self.moments.beta1, self.moments.beta2
        gradient = self.stacks.gradients[:active, self.columns]
        first = self.first[:active].lerp_(gradient, 1.0 - beta1)
        second = self.second[:active].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        correction1, correction2 = 1.0 - beta1**self.steps, 1.0 - beta2**self.steps
        change = second.sqrt().div_(math.sqrt(correction2)).add_(self.moments.epsilon)
        torch.div(first, change, out=change)
        for span, rates in self.spans:
            rate = rates[:active]
            values = self.stacks.values[:active, span]
            values.mul_(1.0 - rate * self.decay[:active])
            inner = slice(span.start - self.columns.start, span.stop - self.columns.start)
            values.sub_(change[:, inner].mul_(rate / correction1))


@dataclass
class StackedSGD:
    """Stochastic gradient descent with heavy-ball momentum."""

    stacks: Stacks
    spans: Sequence[tuple[slice, Tensor]]
    settings: Settings

    def __post_init__(self) -> None:
        """Begin without velocity; there is no memory for it where no client has momentum."""
        moves = bool((self.settings.momentum != 0.0).any())
        self.velocity = torch.zeros_like(self.stacks.values) if moves else None

    def step(self, active: int) -> None:
        """Step once with the first `active` clients."""
        values = self.stacks.values[:active]
        change = torch.addcmul(self.stacks.gradients[:active], values, self.settings.decay[:active])
        if self.velocity is not None:
            change = self.velocity[:active].mul_(self.settings.momentum[:active]).add_(change)
        for span, rates in self.spans:
            values[:, span].sub_(change[:, span] * rates[:active])


@dataclass(frozen=True)
class PairSlots:
    """The slots of one size: their pairs of A and B of all clients are computed together.

    slots : S names. scaling : [clients, S]. trains_a, trains_b : whether they get gradients.
    constants : slot -> (A, B) of all clients where one of them is fixed, [clients, ...].
    """

    slots: tuple[str, ...]
    scaling: Tensor
    trains_a: bool
    trains_b: bool
    constants: dict[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])

    def gather(self, stacks: Stacks, kind: str, active: int, *, gradient: bool = False) -> Tensor:
        """Return A or B of the active clients, or their gradients, [active * S, ...]."""
        pick = stacks.gradient if gradient else stacks.of
        trains = self.trains_a if kind == "A" else self.trains_b
        parts = [pick((s, kind)) if trains else self.constants[s, kind] for s in self.slots]
        return torch.stack([part[:active] for part in parts], dim=1).flatten(0, 1)

    def scatter(self, stacks: Stacks, kind: str, active: int, values: Tensor, *, gradient: bool) -> None:
        """Write gradients back, or add changes to the values."""
        split = values.unflatten(0, (active, len(self.slots))).unbind(1)
        for slot, part in zip(self.slots, split, strict=True):
            if gradient:
                stacks.gradient((slot, kind))[:active] = part.to(stacks.gradients)
            else:
                stacks.of((slot, kind))[:active] += part


@dataclass
class StackedLoraPro:
    """LoRA-Pro: other gradients for the pairs, then AdamW on everything (`airtune.training.optimizers.lora_pro`)."""

    stacks: Stacks
    pairs: Sequence[PairSlots]
    inner: StackedAdamW
    damping: float

    def step(self, active: int) -> None:
        """Step once with the first `active` clients."""
        for pairs in self.pairs:
            self._replace_gradients(pairs, active)
        self.inner.step(active)

    def _replace_gradients(self, pairs: PairSlots, active: int) -> None:
        a, b = (pairs.gather(self.stacks, kind, active) for kind in ("A", "B"))
        scaling = pairs.scaling[:active].flatten()
        square = scaling.double()[:, None, None] ** 2
        if pairs.trains_a and pairs.trains_b:
            grad_a, grad_b = (pairs.gather(self.stacks, kind, active, gradient=True) for kind in ("A", "B"))
            found = zip(("A", "B"), pro_gradients(a, b, grad_a, grad_b, scaling, self.damping), strict=True)
        elif pairs.trains_b:
            grad = pairs.gather(self.stacks, "B", active, gradient=True).double()
            found = [("B", grad @ inverse(a.double() @ a.double().mT, self.damping) / square)]
        else:
            grad = pairs.gather(self.stacks, "A", active, gradient=True).double()
            found = [("A", inverse(b.double().mT @ b.double(), self.damping) @ grad / square)]
        for kind, values in found:
            pairs.scatter(self.stacks, kind, active, values, gradient=True)


@dataclass
class StackedLoraRite:
    """LoRA-RITE on the pairs, AdamW on cores and head (`airtune.training.optimizers.lora_rite`)."""

    stacks: Stacks
    pairs: Sequence[PairSlots]
    settings: Settings
    chosen: LoraRite
    rest: StackedAdamW | None
    sides: dict[int, Side] = field(default_factory=dict[int, Side])
    steps: int = 0

    def step(self, active: int) -> None:
        """Step once with the first `active` clients."""
        work = [(pairs, kind) for pairs in self.pairs for kind in ("A", "B") if _trains(pairs, kind)]
        parts = [self._part(pairs, kind, active) for pairs, kind in work]
        squares = [part[0].square().sum(dim=(1, 2)).view(active, -1).sum(dim=1).double() for part in parts]
        total = torch.stack(squares).sum(dim=0).sqrt()
        shrink = torch.where(total > 0.0, (self.chosen.clip / total).clamp(max=1.0), 1.0)
        changes = [self._change(place, part, shrink, active) for place, part in enumerate(parts)]
        for (pairs, kind), change in zip(work, changes, strict=True):
            count = len(pairs.slots)
            rate, decay = (v[:active].repeat_interleave(count, dim=0)[:, :, None] for v in (self._rate, self._decay))
            current = self._columns(pairs, kind, active)
            step = -rate * (change + decay * current)
            pairs.scatter(self.stacks, kind, active, step.mT if kind == "A" else step, gradient=False)
        self.steps += 1
        if self.rest is not None:
            self.rest.step(active)

    @property
    def _rate(self) -> Tensor:
        return self.settings.rate

    @property
    def _decay(self) -> Tensor:
        return self.settings.decay

    def _columns(self, pairs: PairSlots, kind: str, active: int, *, gradient: bool = False) -> Tensor:
        values = pairs.gather(self.stacks, kind, active, gradient=gradient)
        return values.mT if kind == "A" else values

    def _part(self, pairs: PairSlots, kind: str, active: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient in the basis of its partner, the basis, and the way back."""
        basis, triangle = torch.linalg.qr(self._columns(pairs, "B" if kind == "A" else "A", active))
        back = torch.linalg.pinv(triangle)
        gradient = self._columns(pairs, kind, active, gradient=True) @ back
        size = gradient.square().mean(dim=(1, 2), keepdim=True).sqrt()
        return torch.where(size > self.chosen.skip_above, 0.0, gradient), basis, back

    def _change(self, place: int, part: tuple[Tensor, Tensor, Tensor], shrink: Tensor, active: int) -> Tensor:
        gradient, basis, back = part
        count, rank = len(gradient), gradient.shape[2]
        square = gradient.new_zeros((count, rank, rank))
        empty = Side(torch.zeros_like(basis), torch.zeros_like(gradient), square, square.new_zeros(count))
        side = _first_of(self.sides.get(place, empty), count)
        each = shrink.to(gradient).repeat_interleave(count // active)[:, None, None]
        change, self.sides[place] = rite_update(gradient * each, basis, side, self.steps, self.chosen)
        return change @ back.mT


def stacked_optimizer(
    stacks: Stacks, pairs: Sequence[PairSlots], trainings: Sequence[LocalTraining]
) -> StackedOptimizer:
    """Return a fresh optimizer for a block of clients, whose `LocalTraining.optimizer` is the same.

    Raises
    ------
    InputError : the optimizer has no stacked form.
    """
    layout, settings = stacks.layout, Settings.of(trainings, stacks.values)
    match as_optimizer(trainings[0].optimizer):
        case AdamW() as chosen:
            return StackedAdamW(stacks, settings.spans(layout), settings.decay, chosen)
        case SGD():
            return StackedSGD(stacks, settings.spans(layout), settings)
        case LoraPlus() as chosen:
            return StackedAdamW(stacks, settings.spans(layout, chosen.ratio), settings.decay, chosen)
        case LoraPro() as chosen:
            inner = StackedAdamW(stacks, settings.spans(layout), settings.decay, chosen)
            return StackedLoraPro(stacks, pairs, inner, chosen.damping)
        case LoraRite() as chosen:
            return StackedLoraRite(stacks, pairs, settings, chosen, _rest(stacks, settings))
        case GaLore():
            raise InputError("training.optimizer: the cohort engine has no galore")


def moments_of(optimizer: StackedOptimizer) -> dict[str, Tensor]:
    """Return what an optimizer of all columns remembers value by value, [clients, columns] each; changes act on it.

    Raises
    ------
    InputError : it keeps its moments in another basis.
    """
    match optimizer:
        case StackedAdamW():
            return {"first": optimizer.first, "second": optimizer.second}
        case StackedSGD():
            return {} if optimizer.velocity is None else {"velocity": optimizer.velocity}
        case StackedLoraPro():
            return moments_of(optimizer.inner)
        case _:
            raise InputError(UNMOVABLE)


def _rest(stacks: Stacks, settings: Settings) -> StackedAdamW | None:
    core, extra = stacks.layout.kinds["core"], stacks.layout.kinds["extra"]
    spans = [(slice(*core), settings.rate), (slice(*extra), settings.head_rate)]
    spans = [(span, rate) for span, rate in spans if span.stop > span.start]
    return StackedAdamW(stacks, spans, settings.decay, AdamW()) if spans else None


def _trains(pairs: PairSlots, kind: str) -> bool:
    return pairs.trains_a if kind == "A" else pairs.trains_b


def _first_of(side: Side, count: int) -> Side:
    """Return the moments of the first `count` pairs: clients that have finished stand behind."""
    return Side(side.basis[:count], side.first[:count], side.second[:count], side.escaped[:count])
