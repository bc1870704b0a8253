"""DP-SGD on a client: every example's gradient is clipped, their sum gets noise (arXiv 1607.00133), through opacus.

opacus computes the examples' gradients with hooks on the modules that hold trained parameters, clips them together and
adds the noise; the optimizer then sees an ordinary gradient. Batches are drawn by independent coins, as its accounting
assumes (`poisson_batches`); a batch may be empty, and then the step is noise alone.

What is covered: the tensors that the client sends. What is not: the reported loss, token and example counts, which a
deployment must not send; whether the client took part.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from airtune.errors import InputError
from airtune.training.model import ActiveAdapter, FederatedModel
from airtune.types import LocalTraining, SamplePrivacy

Indices = NDArray[np.int64]


def poisson_batches(indices: Indices, batch_size: int, steps: int, rng: np.random.Generator) -> list[Indices]:
    """Return `steps` batches, each example in each of them with probability min(1, batch_size / examples).

    Parameters
    ----------
    indices : [examples], the client's. batch_size : expected size. rng : of this client and round.
    """
    coins = rng.random((steps, len(indices))) < min(1.0, batch_size / len(indices))
    return [indices[row] for row in coins]


@dataclass
class PrivateGradients:
    """Turns the gradients of examples, which opacus's hooks left at the parameters, into one noisy gradient.

    parameters : all that is trained. optimizer : opacus's, used up to its noise; it takes no step.
    """

    parameters: Sequence[nn.Parameter]
    optimizer: Any

    def apply(self, examples: int) -> None:
        """Put the noisy gradient at the parameters; with no examples it is noise alone."""
        for parameter in self.parameters:
            state: Any = parameter
            if examples == 0:
                state.grad_sample = parameter.new_zeros((0, *parameter.shape))
            elif state.grad_sample is None:  # opacus leaves out what the loss does not depend on
                state.grad_sample = parameter.new_zeros((examples, *parameter.shape))
        self.optimizer.pre_step()
        for parameter in self.parameters:
            state = parameter
            state.grad_sample = state.summed_grad = None


@contextmanager
def private_gradients(
    model: FederatedModel, active: ActiveAdapter, training: LocalTraining, examples: int, seed: int
) -> Generator[PrivateGradients | None]:
    """Yield what makes gradients private while the context lasts; None if `training.privacy` is None.

    Parameters
    ----------
    model, active : with the client's adapter on it. examples : of the client. seed : of the noise.

    Raises
    ------
    InputError : opacus is not installed, the model's precision is bf16, the loss is no mean over examples, or the
        adapter trains something that is not the weight of a linear layer.
    """
    privacy = training.privacy
    if privacy is None:
        yield None
        return
    _check(model, active)
    parameters = [tensor for _, _, tensor in active.trained() if isinstance(tensor, nn.Parameter)]
    modules = [m for m in model.network.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    hooks: Any = _opacus("opacus.grad_sample").GradSampleHooks(model.network, strict=False, loss_reduction="mean")
    for module in modules:
        module.train()  # opacus looks at modules that train only; linear layers compute the same either way
    try:
        yield PrivateGradients(parameters, _noise(parameters, privacy, min(training.batch_size, examples), seed, model))
    finally:
        hooks.remove_hooks()
        for module in modules:
            module.eval()


def _noise(
    parameters: Sequence[nn.Parameter], privacy: SamplePrivacy, expected: int, seed: int, model: FederatedModel
) -> Any:
    """Return opacus's optimizer, of which only clipping and noise are used."""
    return _opacus("opacus.optimizers").DPOptimizer(
        torch.optim.SGD(list(parameters), lr=0.0),
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.largest_norm,
        expected_batch_size=expected,
        generator=torch.Generator(device=model.device).manual_seed(seed),
    )


def _check(model: FederatedModel, active: ActiveAdapter) -> None:
    if model.precision == "bf16":
        raise InputError('training.privacy: gradients of single examples need precision "fp32" or "fp64"')
    if model.config.task == "causal-lm":
        raise InputError(
            "training.privacy: the loss of a causal-lm is a mean over tokens; valid: a classification task"
        )
    if active.gains or active.gates:
        kind = model.config.adapter
        raise InputError(f'training.privacy: {kind} trains more than weights of linear layers; valid: "lora", "rslora"')
    linear = {id(p) for m in model.network.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    strangers = [owner for owner, _, tensor in active.trained() if id(tensor) not in linear]
    if strangers:
        raise InputError(
            f"training.privacy: {strangers[0]!r} is not part of a linear layer, whose examples opacus knows"
        )


def _opacus(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError("training.privacy: needs the package opacus: airtune[privacy]") from error
