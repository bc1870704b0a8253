"""Loading a base model through transformers: every weight that is not the head's must come from the file."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from airtune.errors import InputError
from airtune.training.catalogue import resolve_model
from airtune.training.hardware import Precision, checked_device, checked_precision
from airtune.training.model import FederatedModel
from airtune.training.shapes import ModelConfig, Task, adapter_shape

_CLASSES: Mapping[Task, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}


def load_model(
    config: ModelConfig,
    *,
    num_labels: int | None = None,
    precision: Precision = "fp32",
    device: str = "cpu",
) -> FederatedModel:
    """Load a base model from the catalogue, a folder or the Hugging Face hub, and prepare it for a federation.

    Raises
    ------
    InputError : the model is not there, not of a known family, its file lacks weights other than the head's, or
        precision or device are not available.
    """
    checked_precision(precision, checked_device(device))
    network, fresh = load_network(config, num_labels)
    return FederatedModel(network, config, num_labels=num_labels, precision=precision, device=device, fresh=fresh)


def load_network(config: ModelConfig, num_labels: int | None) -> tuple[Any, frozenset[str]]:
    """Return a base model as transformers loads it, in single precision, and the names of its head's new parameters.

    Raises
    ------
    InputError : as `load_model`.
    """
    import transformers

    where = resolve_model(config.name)
    kind: Any = getattr(transformers, _CLASSES[config.task])
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            settings: Any = transformers.AutoConfig.from_pretrained(where)
            if config.task != "causal-lm":
                settings.num_labels = num_labels
            shape = adapter_shape(settings.to_dict(), config, num_labels)
            loaded: Any = kind.from_pretrained(
                where, config=settings, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except OSError as error:
        raise InputError(f"model.name: cannot load {config.name!r}: {' '.join(str(error).split())[:300]}") from error
    network, info = loaded
    fresh = frozenset(info["missing_keys"]) | {str(entry[0]) for entry in info["mismatched_keys"]}
    if lacking := sorted(fresh - set(shape.extras)):
        raise InputError(f"model.name: the weights of {config.name!r} lack {', '.join(lacking[:5])}")
    return network, fresh


@contextmanager
def quiet() -> Generator[None]:
    """Silence the reports and progress bars of transformers for a moment."""
    import transformers

    log: Any = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
