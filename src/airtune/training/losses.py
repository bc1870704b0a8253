"""The loss of a batch, as a sum and a weight, so that sums over batches stay exact."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from airtune.training.data import IGNORED_LABEL


def loss_by_example(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of each example and what it is a sum over, both [batch].

    Parameters
    ----------
    logits, labels : [batch, classes] and [batch]; the weight is 1. Or [batch, tokens, vocabulary] and [batch, tokens],
        where position t predicts label t + 1 and labels of -100 count for nothing; the weight is the number of
        predicted tokens.
    """
    if labels.ndim == 1:
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses, losses.new_ones(losses.shape)
    predicted, wanted = logits[:, :-1], labels[:, 1:]
    losses = functional.cross_entropy(predicted.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED_LABEL)
    return losses.sum(dim=1), (wanted != IGNORED_LABEL).sum(dim=1).to(losses.dtype)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of a batch, over examples or over predicted tokens."""
    losses, weights = loss_by_example(logits, labels)
    return losses.sum() / weights.sum()
