"""A checkpoint gives back the same tree, to the bit, or refuses; it is never half written."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import save as to_bytes

from airtune.errors import InputError
from airtune.experiment import checkpoint
from airtune.federation import Progress
from airtune.types import Pending, ServerModel
from small_world import make_adapter


@dataclass(frozen=True)
class Memory:
    """A method's state with everything that a state may hold."""

    numbers: Any = None
    nested: dict[Any, Any] = field(default_factory=dict)
    derived: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", 7)


def progress(state: Any) -> Progress:
    return Progress(
        3, 1.5, ServerModel(make_adapter()), state, Pending(held_version={4: 2}, memory={1: {"e": torch.ones(2)}})
    )


def same(left: Any, right: Any) -> bool:
    """Compare two trees: types, values and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.stride() == right.stride() and same(left.numpy(), right.numpy())
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, np.generic):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return bool(left == right)


ARRAYS = npst.arrays(
    st.sampled_from([np.float64, np.float32, np.int64, np.bool_, np.uint8]),
    npst.array_shapes(min_dims=0, max_dims=3, max_side=4),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | ARRAYS
    | ARRAYS.map(lambda a: a.ravel()[0])
    | ARRAYS.map(torch.from_numpy)
)
KEYS = st.integers() | st.text(max_size=4) | st.tuples(st.integers(), st.text(max_size=2))
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.frozensets(st.integers(), max_size=3)
        | st.builds(Memory, inner, st.dictionaries(KEYS, inner, max_size=2))
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_state_comes_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder, progress(state), "d")
    assert same(checkpoint.load(folder, "d"), progress(state))


def test_memory_order_and_sharing_survive(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = (shared.T, shared, shared, np.arange(6).reshape(2, 3).T)
    checkpoint.save(tmp_path, progress(state))
    back = checkpoint.load(tmp_path).state
    assert same(state, back)
    assert back[1] is back[2]
    assert back[3].flags.f_contiguous


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, progress("old"))

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, crash)
            checkpoint.save(tmp_path, progress("new"))
        assert checkpoint.load(tmp_path).state == "old"
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / checkpoint.FILE).write_bytes(b"not one")
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, progress(None), "mine")
    with pytest.raises(InputError, match="another configuration"):
        checkpoint.load(tmp_path, "yours")


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "nowhere:Thing", "airtune.errors:InputError", "builtins:eval"]
)
def test_only_dataclasses_are_ever_made(tmp_path: Path, name: str) -> None:
    tree = {"object": name, "fields": {}}
    header = {"schema": checkpoint.SCHEMA, "round": 1, "digest": "", "progress": tree}
    (tmp_path / checkpoint.FILE).write_bytes(to_bytes({"x": torch.zeros(1)}, metadata={"airtune": json.dumps(header)}))
    with pytest.raises(InputError, match="no class of this version"):
        checkpoint.load(tmp_path)


def test_what_has_no_place_in_a_checkpoint_is_a_bug_of_the_method(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Local:
        x: int = 1

    for state in (object(), lambda: 1, {1, 2}, np.random.default_rng(0), Local()):
        with pytest.raises(TypeError, match="place in a checkpoint"):
            checkpoint.save(tmp_path, progress(state))
