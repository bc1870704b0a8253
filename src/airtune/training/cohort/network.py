"""Where the cohort engine enters the network: the adapted layers and the head's linear layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from airtune.errors import InputError
from airtune.training.cohort.linear import AdaptedLayer, HeadLayer, Replaced, Session
from airtune.training.cohort.members import TWIN
from airtune.training.model import FederatedModel
from airtune.training.shapes import is_gain, placement_of, stack_name

SERVED = ("lora", "rslora", "msp-lora", "beam-lora")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def head_keys(model: FederatedModel) -> tuple[str, ...]:
    """Return the names of the head's tensors."""
    return tuple(name for name in model.shape.extras if not is_gain(name))


def replacements(model: FederatedModel, session: Session) -> Replaced:
    """Return the forward passes of every adapted layer, and of the head's layers."""
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    for name in placement_of(model.shape):
        layer = model.network.get_submodule(name)
        forwards[layer] = AdaptedLayer(name, layer.base_layer, session)
    for module, names in _head_modules(model).items():
        weight, bias = f"{module}.weight", f"{module}.bias"
        forwards[model.network.get_submodule(module)] = HeadLayer(
            (weight, "extra"), (bias, "extra") if bias in names else None, session
        )
    return Replaced(forwards)


def checkpointed(model: FederatedModel) -> Replaced:
    """Return forward passes of the layers that keep their input alone and run again for the backward pass.

    Raises
    ------
    InputError : the network has no plain list of layers.
    """
    where = stack_name(model.config_json)
    try:
        layers = model.network.get_submodule(where)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"training.checkpointing: the network has no plain list of layers {where!r}; valid: false")
    return Replaced({layer: _twice(layer.forward) for layer in layers})


def _twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def check_model(model: FederatedModel) -> None:
    """Refuse networks whose clients cannot be told apart row by row, and adapters without a stacked form.

    Raises
    ------
    InputError : one line with the reason.
    """
    if (kind := model.config.adapter) not in SERVED:
        raise InputError(
            f"model.adapter: the cohort engine has no {kind}, whose layers are more than factors; valid: "
            f"{', '.join(SERVED)}, or {TWIN}"
        )
    for name, module in model.network.named_modules():
        if isinstance(module, BATCH_NORMS):
            raise InputError(f"model.name: {name} normalises over a batch, which would couple clients; valid: {TWIN}")
    for module in _head_modules(model):
        if not isinstance(model.network.get_submodule(module), nn.Linear):
            raise InputError(f"model.name: the head's {module} is no linear layer; valid: {TWIN}")


def _head_modules(model: FederatedModel) -> dict[str, set[str]]:
    """Return the modules that hold the head's tensors, with the names of these."""
    found: dict[str, set[str]] = {}
    for name in head_keys(model):
        found.setdefault(name.rpartition(".")[0], set()).add(name)
    return found
