"""Partitions: every example at most once, by our seed alone, and skewed as the name says."""

import subprocess
import sys
import zlib

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.training.partition import (
    PARTITIONERS,
    Dirichlet,
    Exponential,
    Iid,
    Linear,
    Shard,
    Square,
    label_counts,
    partitioner_type,
)

LABELS = np.random.default_rng(0).integers(0, 8, 4000)
ALL = (Iid(), Dirichlet(), Dirichlet(alpha=0.1, self_balancing=True), Shard(), Linear(), Square(), Exponential())


@pytest.mark.parametrize("partitioner", ALL, ids=str)
@pytest.mark.parametrize("clients", [1, 5])
def test_examples_are_dealt_out_once_and_by_seed(partitioner, clients: int) -> None:
    parts = partitioner(LABELS, clients, seed=3)
    assert len(parts) == clients
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt) and dealt.min() >= 0 and dealt.max() < len(LABELS)
    unused = len(LABELS) % (clients * partitioner.shards_per_client) if isinstance(partitioner, Shard) else 0
    assert len(dealt) == len(LABELS) - unused
    again, other = partitioner(LABELS, clients, seed=3), partitioner(LABELS, clients, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_the_partition_does_not_depend_on_the_process_or_on_earlier_draws() -> None:
    code = (
        "import numpy as np, zlib\n"
        "from airtune.training.partition import PARTITIONERS\n"
        "labels = np.arange(600) % 5\n"
        "parts = [part for kind in PARTITIONERS.values() for part in kind()(labels, 4, seed=9)]\n"
        "print(zlib.crc32(b''.join(part.tobytes() for part in parts)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    labels = np.arange(600) % 5
    parts = [part for kind in reversed(PARTITIONERS.values()) for part in reversed(kind()(labels, 4, seed=9))]
    assert int(done.stdout) == zlib.crc32(b"".join(part.tobytes() for part in reversed(parts)))


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    def largest_share(alpha: float) -> float:
        counts = label_counts(LABELS, Dirichlet(alpha=alpha)(LABELS, 20, seed=0), 8)
        held = counts[counts.sum(1) > 0]
        return float((held.max(1) / held.sum(1)).mean())

    shares = [largest_share(alpha) for alpha in (0.05, 0.5, 5.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.7
    assert shares[-1] < 0.25  # every client holds nearly an eighth of each class


def test_dirichlet_follows_the_dirichlet_law() -> None:
    """Over many seeds the share of one client in one class has the mean 1/K and variance (K-1) / (K^2 (K a + 1))."""
    labels, clients, alpha, seeds = np.zeros(500, dtype=int), 4, 0.5, 100
    shares = np.array([[len(p) / 500 for p in Dirichlet(alpha=alpha)(labels, clients, seed=s)] for s in range(seeds)])
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.mean(0) == pytest.approx(np.full(clients, 1 / clients), abs=4 * np.sqrt(variance / seeds))
    assert shares.var() == pytest.approx(variance, rel=0.3)


def test_a_client_may_end_up_without_examples() -> None:
    parts = Dirichlet(alpha=0.01)(LABELS[:200], 50, seed=0)
    assert min(len(part) for part in parts) == 0
    assert sum(len(part) for part in parts) == 200
    assert label_counts(LABELS, parts, 8).sum() == 200


def test_self_balancing_narrows_the_spread_of_sizes() -> None:
    def largest(balance: bool) -> int:
        return max(len(p) for p in Dirichlet(alpha=0.3, self_balancing=balance)(LABELS, 20, seed=0))

    assert largest(True) < largest(False)


def test_shards_hold_few_classes_and_equal_sizes() -> None:
    parts = Shard(shards_per_client=2)(LABELS, 20, seed=0)
    assert {len(part) for part in parts} == {len(LABELS) // 20}
    classes = (label_counts(LABELS, parts, 8) > 0).sum(1)
    assert classes.max() <= 4  # a shard is smaller than a class, so it touches two classes at most
    assert classes.mean() < 3


def test_quantity_skew_has_its_law_and_a_random_order() -> None:
    for partitioner, law in ((Linear(), lambda i: i), (Square(), lambda i: i**2), (Exponential(), np.exp)):
        sizes = np.array([len(part) for part in partitioner(LABELS, 6, seed=1)])
        units = law(np.arange(1.0, 7.0))
        assert np.sort(sizes) == pytest.approx(len(LABELS) * units / units.sum(), abs=6)
        orders = {tuple(np.argsort([len(p) for p in partitioner(LABELS, 6, seed=seed)])) for seed in range(6)}
        assert len(orders) > 1
        counts = label_counts(LABELS, partitioner(LABELS, 6, seed=1), 8)
        assert (counts[np.argmax(sizes)] / sizes.max()).max() < 0.2  # but no label skew


def test_iid_shares_are_equal_and_unskewed() -> None:
    parts = Iid()(LABELS, 7, seed=0)
    assert {len(part) for part in parts} <= {len(LABELS) // 7, len(LABELS) // 7 + 1}
    assert (label_counts(LABELS, parts, 8) / np.array([[len(p)] for p in parts])).max() < 0.2


def test_label_counts_by_hand() -> None:
    counts = label_counts(np.array([0, 2, 2, 1]), [np.array([0, 1, 2]), np.array([3]), np.array([], dtype=int)], 4)
    assert counts.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_bad_input_is_one_line_with_the_field() -> None:
    with pytest.raises(InputError, match=r"partition\.name: unknown name 'dirichle'.*did you mean 'dirichlet'"):
        partitioner_type("dirichle")
    assert partitioner_type("dirichlet") is Dirichlet and set(PARTITIONERS) == {p.name for p in ALL}
    with pytest.raises(InputError, match=r"partition\.alpha: 0"):
        Dirichlet(alpha=0)
    with pytest.raises(InputError, match=r"partition\.shards_per_client: 0"):
        Shard(shards_per_client=0)
    with pytest.raises(InputError, match=r"partition\.shards_per_client: 100 clients times 2 shards"):
        Shard()(LABELS[:150], 100, seed=0)
    with pytest.raises(InputError, match=r"fleet\.clients: 0"):
        Iid()(LABELS, 0, seed=0)
    for clients in (60, 1000):
        with pytest.raises(InputError, match=rf"'exponential' cannot deal 4000 examples to {clients} clients"):
            Exponential()(LABELS, clients, seed=0)
    with pytest.raises(InputError, match="'dirichlet' cannot deal 3 examples to 5 clients"):
        Dirichlet()(LABELS[:3], 5, seed=0)
