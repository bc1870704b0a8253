"""What the optimizers of `airtune.optimizers` compute. One file each; the plain ones are torch's.

An optimizer is made from the client's active adapter, not from a list of tensors: several of them need the pair (A, B)
of a slot and its scaling. A new one is a dataclass there, a file here, and a line in `make_optimizer`.
"""

from __future__ import annotations

from airtune.optimizers import SGD, AdamW, GaLore, LoraPlus, LoraPro, LoraRite, as_optimizer
from airtune.training.model import ActiveAdapter
from airtune.training.optimizers.galore import GaLoreStep
from airtune.training.optimizers.groups import LocalOptimizer
from airtune.training.optimizers.lora_pro import LoraProStep
from airtune.training.optimizers.lora_rite import LoraRiteStep
from airtune.training.optimizers.plain import adamw, lora_plus, sgd
from airtune.types import LocalTraining

__all__ = ["LocalOptimizer", "make_optimizer"]


def make_optimizer(active: ActiveAdapter, training: LocalTraining) -> LocalOptimizer:
    """Return a fresh optimizer for what the client trains.

    Raises
    ------
    InputError : the optimizer cannot train this slice.
    """
    match as_optimizer(training.optimizer):
        case AdamW() as chosen:
            return adamw(active, training, chosen)
        case SGD():
            return sgd(active, training)
        case LoraPlus() as chosen:
            return lora_plus(active, training, chosen)
        case LoraRite() as chosen:
            return LoraRiteStep(active, training, chosen)
        case LoraPro() as chosen:
            return LoraProStep(active, training, chosen)
        case GaLore() as chosen:
            return GaLoreStep(active, training, chosen)
