"""Streams: the same place gives the same numbers, another place gives others, and the numbers are uniform."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from airtune.streams import stream, torch_seed, uniform_field

PLACES = st.tuples(st.integers(0, 2**63 - 1), st.sampled_from(["cohort", "fading", "batches"]), st.integers(0, 10**6))


@given(PLACES)
def test_a_place_always_gives_the_same_numbers(place: tuple[int, str, int]) -> None:
    assert stream(*place).random(3).tolist() == stream(*place).random(3).tolist()
    assert torch_seed(*place) == torch_seed(*place)
    assert uniform_field(*place) == uniform_field(*place)


@given(PLACES, PLACES)
def test_two_places_give_different_numbers(one: tuple[int, str, int], other: tuple[int, str, int]) -> None:
    if one == other:
        return
    assert stream(*one).integers(2**62) != stream(*other).integers(2**62)
    assert uniform_field(*one) != uniform_field(*other)


def test_a_field_entry_depends_on_its_own_place_only() -> None:
    clients = np.arange(50)
    whole = uniform_field(7, "fading", clients[:, None], np.arange(20)[None, :])
    assert whole.shape == (50, 20)
    assert whole[31, 4] == uniform_field(7, "fading", 31, 4)
    np.testing.assert_array_equal(whole[[3, 9]], uniform_field(7, "fading", np.array([[3], [9]]), np.arange(20)))


def test_fields_are_uniform_and_uncorrelated_along_every_axis() -> None:
    field = uniform_field(1, "shadowing", np.arange(400)[:, None], np.arange(500)[None, :])
    assert 0.0 < field.min() and field.max() < 1.0
    assert stats.kstest(field.ravel(), "uniform").pvalue > 1e-3
    for shifted, base in ((field[1:], field[:-1]), (field[:, 1:], field[:, :-1])):
        assert abs(np.corrcoef(shifted.ravel(), base.ravel())[0, 1]) < 4 / np.sqrt(base.size)
    other = uniform_field(2, "shadowing", np.arange(400)[:, None], np.arange(500)[None, :])
    assert abs(np.corrcoef(field.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(field.size)
