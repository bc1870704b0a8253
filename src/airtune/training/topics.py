"""Pseudo labels for texts without labels: clusters of rows that use like words.

HierFedLoRA groups clients by what their data are about, and partitions deal rows out by class; texts of a generative
task have no classes. A row becomes the counts of its tokens, hashed to 2048 buckets, logarithmic, weighted by how few
rows have the bucket (tf-idf), projected on the leading singular vectors (latent semantic analysis), as many as there
are topics; k-means on the sphere makes the clusters. No network is run: topics that differ by words are found, those
that differ by meaning alone are not. All of it is our choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.streams import stream

if TYPE_CHECKING:
    from airtune.training.data import TokenizedData
    from airtune.training.examples import Examples

Points = NDArray[np.float32]
Ints = NDArray[np.int64]

BUCKETS = 2048
_FITTED = 4096  # rows that directions and centres are found on
_CHUNK = 4096  # rows whose counts are in memory at a time
_STARTS, _PASSES = 5, 30


def with_topics(rows: Examples, topics: int | None, seed: int) -> Examples:
    """Return rows whose labels are topics, "topic 0" and so on; as they are if no topics are wanted.

    Raises
    ------
    InputError : the rows have labels of their own, are no texts, or are fewer than the topics.
    """
    from airtune.training.data import TokenizedData

    if topics is None:
        return rows
    if rows.task != "causal-lm" or not isinstance(rows, TokenizedData):
        raise InputError(f"data.topics: the task is {rows.task}; valid: none, or model.task causal-lm")
    if rows.label_names:
        raise InputError("data.topics: the rows have labels of their own; valid: none")
    if topics > len(rows):
        raise InputError(f"data.topics: {topics} is more than the {len(rows)} rows; valid: 2 to {len(rows)}")
    names = tuple(f"topic {index}" for index in range(topics))
    return replace(rows, labels=topics_of(rows, topics, seed), num_labels=topics, label_names=names)


def topics_of(rows: TokenizedData, topics: int, seed: int) -> Ints:
    """Return the topic of every row, [rows], 0 to topics - 1; a pure function of rows, number and seed."""
    from scipy.sparse.linalg import svds

    rng = stream(seed, "topics")
    fitted = np.sort(rng.permutation(len(rows))[:_FITTED])
    counts = _counts(rows, fitted)
    weight = np.log(len(fitted) / np.maximum((counts > 0).sum(axis=0), 1)).astype(np.float32)
    words = _on_sphere(np.log1p(counts) * weight)
    start = rng.normal(size=min(words.shape)).astype(np.float32)
    directions = svds(words, k=min(topics, len(fitted) - 1), v0=start)[2].T
    centres = _centres(_on_sphere(words @ directions), topics, rng)
    chunks = np.split(np.arange(len(rows)), range(_CHUNK, len(rows), _CHUNK))
    projected = (_on_sphere(np.log1p(_counts(rows, part)) * weight) @ directions for part in chunks)
    return np.concatenate([np.argmax(part @ centres.T, axis=1) for part in projected])


def _counts(rows: TokenizedData, chosen: Ints) -> Points:
    """Return how often each bucket occurs in some rows, [chosen, buckets]."""
    ids = [rows.ids[rows.offsets[i] : rows.offsets[i + 1]] for i in chosen]
    place = np.repeat(np.arange(len(chosen)), [len(row) for row in ids])
    buckets = (np.concatenate([np.empty(0, np.int32), *ids]).astype(np.uint64) * np.uint64(2654435761)) >> np.uint64(16)
    flat = place * BUCKETS + (buckets % np.uint64(BUCKETS)).astype(np.int64)
    return np.bincount(flat, minlength=len(chosen) * BUCKETS).reshape(len(chosen), BUCKETS).astype(np.float32)


def _on_sphere(points: Points) -> Points:
    """Return the points scaled to length 1; those at the origin stay there."""
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def _centres(points: Points, count: int, rng: np.random.Generator) -> Points:
    """Return the centres, [count, directions], of the best of several runs of k-means."""
    found = [_run(points, count, rng) for _ in range(_STARTS)]
    return max(found, key=lambda centres: float((points @ centres.T).max(axis=1).sum()))


def _run(points: Points, count: int, rng: np.random.Generator) -> Points:
    """Return the centres after one run that starts at points far from each other (k-means++)."""
    centres = points[[int(rng.integers(len(points)))]]
    for _ in range(count - 1):
        far = np.maximum(1.0 - (points @ centres.T).max(axis=1), 1e-9).astype(np.float64)
        centres = np.vstack([centres, points[int(rng.choice(len(points), p=far / far.sum()))]])
    nearest = np.argmax(points @ centres.T, axis=1)
    for _ in range(_PASSES):
        sums = np.stack([points[nearest == topic].sum(axis=0) for topic in range(count)])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0.0, sums / np.maximum(norms, 1e-12), centres)  # an empty one stays where it is
        before, nearest = nearest, np.argmax(points @ centres.T, axis=1)
        if np.array_equal(before, nearest):
            break
    return centres
