"""Who holds which training example: the partitioners of flwr-datasets under our seed.

Each partitioner here is a frozen dataclass whose fields are its configuration. Called with the label of every
example, it returns one array of example numbers a client. A client may end up without examples.

Not all partitioners of flwr-datasets shuffle, and those that do have a seed of their own. So the examples are put
into a random order with the stream ``"partition"`` of our seed first, and partitioners that take a seed get one from
the same stream. Equal seeds give equal partitions, whatever the partitioner.

flwr-datasets imports matplotlib, seaborn and pandas on import (seconds), so it is imported when a partition is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError, unknown_name
from airtune.streams import stream, torch_seed

Indices = NDArray[np.int64]
Labels = NDArray[np.integer[Any]]


class Partitioner(Protocol):
    """Anything that deals examples out to clients."""

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client.

        Parameters
        ----------
        labels : [examples], class of each example.
        clients : how many.
        seed : the experiment's seed.

        Raises
        ------
        InputError : the data cannot be dealt out this way.
        """
        ...


@dataclass(frozen=True)
class Iid:
    """Every client gets an equal share, drawn at random; shares differ by one example at most."""

    name: ClassVar[str] = "iid"

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client; see `Partitioner`."""

        def build(flower: Any) -> Any:
            return flower.IidPartitioner(num_partitions=clients)

        return _deal(build, labels, clients, seed, self.name)


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: the examples of each class are split over the clients by one draw from a Dirichlet law.

    After Yurochkin et al., "Bayesian nonparametric federated learning of neural networks", ICML 2019. A small client
    may get nothing: `min_examples` is 0 so that a partition is never drawn again until it suits.

    Attributes
    ----------
    alpha : concentration, > 0. Large is near to equal shares of every class, small gives clients of few classes.
    self_balancing : stop giving a class to clients that hold more than the average already.
    """

    name: ClassVar[str] = "dirichlet"
    alpha: float = 1.0
    self_balancing: bool = False

    def __post_init__(self) -> None:
        """Refuse values that can never be right."""
        if not self.alpha > 0:
            raise InputError(f"partition.alpha: {self.alpha} is not positive")

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client; see `Partitioner`."""

        def build(flower: Any) -> Any:
            return flower.DirichletPartitioner(
                num_partitions=clients,
                partition_by="label",
                alpha=float(self.alpha),
                min_partition_size=0,
                self_balancing=self.self_balancing,
                seed=torch_seed(seed, "partition", 1),
            )

        return _deal(build, labels, clients, seed, self.name)


@dataclass(frozen=True)
class Shard:
    """Label skew: the examples, sorted by class, are cut into equal shards, and every client gets some of them.

    After McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017.
    The last ``examples mod (clients * shards_per_client)`` examples in the order of classes stay unused.

    Attributes
    ----------
    shards_per_client : >= 1; few shards are few classes.
    """

    name: ClassVar[str] = "shard"
    shards_per_client: int = 2

    def __post_init__(self) -> None:
        """Refuse values that can never be right."""
        if self.shards_per_client < 1:
            raise InputError(f"partition.shards_per_client: {self.shards_per_client} is not positive")

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client; see `Partitioner`."""
        if clients * self.shards_per_client > len(labels):
            raise InputError(
                f"partition.shards_per_client: {clients} clients times {self.shards_per_client} shards "
                f"need as many examples, the data has {len(labels)}"
            )

        def build(flower: Any) -> Any:
            return flower.ShardPartitioner(
                num_partitions=clients,
                partition_by="label",
                num_shards_per_partition=self.shards_per_client,
                seed=torch_seed(seed, "partition", 1),
            )

        return _deal(build, labels, clients, seed, self.name)


@dataclass(frozen=True)
class Linear:
    """Quantity skew: shares grow as 1, 2, 3, ...; which client gets which share is drawn at random.

    flwr-datasets gives the largest share to the last client. The random order is ours, so that the amount of data does
    not follow the order of the devices in the fleet. The same holds for `Square` and `Exponential`.
    """

    name: ClassVar[str] = "linear"

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client; see `Partitioner`."""
        return _deal_by_size("LinearPartitioner", labels, clients, seed, self.name)


@dataclass(frozen=True)
class Square:
    """Quantity skew: shares grow as 1, 4, 9, ...; see `Linear`."""

    name: ClassVar[str] = "square"

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client; see `Partitioner`."""
        return _deal_by_size("SquarePartitioner", labels, clients, seed, self.name)


@dataclass(frozen=True)
class Exponential:
    """Quantity skew: shares grow as e, e^2, e^3, ..., so a dozen clients at most get any; see `Linear`."""

    name: ClassVar[str] = "exponential"

    def __call__(self, labels: Labels, clients: int, *, seed: int) -> list[Indices]:
        """Return the example numbers of each client; see `Partitioner`."""
        return _deal_by_size("ExponentialPartitioner", labels, clients, seed, self.name)


PARTITIONERS: Mapping[str, type[Iid | Dirichlet | Shard | Linear | Square | Exponential]] = MappingProxyType(
    {kind.name: kind for kind in (Iid, Dirichlet, Shard, Linear, Square, Exponential)}
)


def partitioner_type(name: str) -> type[Iid | Dirichlet | Shard | Linear | Square | Exponential]:
    """Return the partitioner of a name; its dataclass fields are what can be configured.

    Raises
    ------
    InputError : unknown name.
    """
    if name not in PARTITIONERS:
        raise unknown_name("partition.name", name, PARTITIONERS)
    return PARTITIONERS[name]


def label_counts(labels: Labels, parts: Sequence[Indices], num_labels: int) -> NDArray[np.int64]:
    """Return how many examples of each class each client holds, [clients, classes]."""
    rows = [np.bincount(np.asarray(labels)[part], minlength=num_labels) for part in parts]
    return np.array(rows, dtype=np.int64).reshape(len(parts), num_labels)


def _deal_by_size(kind: str, labels: Labels, clients: int, seed: int, name: str) -> list[Indices]:
    def build(flower: Any) -> Any:
        return getattr(flower, kind)(num_partitions=clients)

    parts = _deal(build, labels, clients, seed, name)
    return [parts[i] for i in stream(seed, "partition", 2).permutation(clients)]


def _deal(build: Callable[[Any], Any], labels: Labels, clients: int, seed: int, name: str) -> list[Indices]:
    """Run a partitioner of flwr-datasets over a table of example numbers and labels in random order.

    Parameters
    ----------
    build : gets the module ``flwr_datasets.partitioner`` and returns the partitioner.
    """
    if clients < 1:
        raise InputError(f"fleet.clients: {clients} is not positive")
    from datasets import Dataset
    from flwr_datasets import partitioner as flower

    order = stream(seed, "partition", 0).permutation(len(labels))
    table = Dataset.from_dict({"example": order, "label": np.asarray(labels, dtype=np.int64)[order]})
    try:
        with warnings.catch_warnings():  # numpy's overflow warnings come before the error that we turn into ours
            warnings.simplefilter("ignore")
            partitioner = build(flower)
            partitioner.dataset = table
            parts = [partitioner.load_partition(client)["example"][:] for client in range(clients)]
    except (ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"partition.name: {name!r} cannot deal {len(labels)} examples to {clients} clients: {reason}"
        ) from error
    return [np.array(cast("list[int]", part), dtype=np.int64) for part in parts]
