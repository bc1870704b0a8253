"""pfl's side: FederatedAveraging on SimulatedBackend with PyTorchModel, one model per process, as pfl's users run it.

python -m race.pfl_side WORK GATE        (for several processes: with RANK, WORLD_SIZE ... as torchrun sets them)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from race.gate import Gate
from race.peft_client import Work, get_state, loss_of, save


class Network(torch.nn.Module):
    """The PEFT model with the two methods that pfl asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return loss_of(self.model, batch)

    def metrics(self, **batch: torch.Tensor) -> dict:
        """Return nothing of worth: pfl evaluates in its first round, but the race measures elsewhere."""
        return {"nothing": Weighted(0.0, 1)}


class Batches(Dataset):
    """One client's data: the given batches of the present round."""

    def __init__(self, work: Work, rounds: Rounds, client: int) -> None:
        """Look the round up when the batches are asked for."""
        super().__init__((np.zeros(work.settings["examples"][client]),), user_id=str(client))
        self.work, self.rounds, self.client = work, rounds, client

    def iter(self, batch_size: int | None):
        """Yield the batches."""
        yield from self.work.client_batches(self.rounds.number, self.client)


class Rounds(TrainingProcessCallback):
    """Counts the rounds and waits at the gate before each (the first process does, the others wait for it)."""

    def __init__(self, gate: Gate | None, last: int) -> None:
        """Stand before round 1."""
        self.gate, self.number, self.last = gate, 1, last

    def on_train_begin(self, *, model) -> Metrics:
        """Wait before round 1."""
        self._wait()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration: int):
        """Wait before the next round."""
        self.number += 1
        if self.number <= self.last:
            self._wait()
        elif self.gate is not None:
            self.gate.close()
        return False, Metrics()

    def _wait(self) -> None:
        if self.gate is not None:
            self.gate.wait()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def adamw(parameters, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of all sides."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0)


def main(folder: Path, gate_folder: Path) -> None:
    """Run all rounds and write the final adapter."""
    first = int(os.environ.get("RANK", "0")) == 0
    torch.set_num_threads(int(os.environ["RACE_THREADS"]))
    np.random.seed(0)  # noqa: NPY002  (pfl draws from it)
    work = Work(folder)
    settings = work.settings
    rounds = Rounds(Gate(gate_folder) if first else None, settings["all_rounds"])
    network = Network(work.build())
    model = PyTorchModel(
        network, adamw, torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    )  # the mean of the clients' differences, applied with rate 1: federated averaging
    clients = MinimizeReuseUserSampler(list(range(settings["clients"])))
    data = FederatedDataset(lambda client: Batches(work, rounds, client), clients)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=settings["all_rounds"],
            evaluation_frequency=settings["all_rounds"] + 1,
            train_cohort_size=settings["clients"],
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=settings["learning_rate"],
            local_batch_size=settings["batch_size"],
        ),
        callbacks=[rounds],
        send_metrics_to_platform=False,
    )
    if first:
        save(get_state(network.model), gate_folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
