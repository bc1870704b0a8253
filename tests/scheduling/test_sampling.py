"""Who takes part: inclusion probabilities are what they are said to be."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.scheduling.samplers import Sampler
from airtune.scheduling.sampling import All, Independent, Uniform, Weighted, inclusion_probabilities
from airtune.scheduling.work import candidates
from airtune.streams import stream
from airtune.types import Observation, Pending, ServerModel
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet, make_links

EXAMPLES = np.array([1, 2, 3, 4, 50, 6, 7, 8])


def seen_by(examples: np.ndarray = EXAMPLES) -> Observation:
    world = SyntheticWorld(make_fleet(len(examples), examples=examples))
    return world.observe(1, 0.0, Pending(), ServerModel(make_adapter()))


@pytest.mark.parametrize("sampler", [All(), Uniform(3), Weighted(3), Independent(3.0), Independent(3.0, "examples")])
def test_frequencies_match_the_inclusion_probabilities(sampler: Sampler) -> None:
    seen, draws = seen_by(), 4000
    able = candidates(seen)
    counts, said = np.zeros(8), np.zeros(8)
    for draw in range(draws):
        cohort = sampler.sample(able, seen, stream(0, "test", draw))
        assert np.all(np.diff(cohort.clients) > 0)
        counts[cohort.clients] += 1
        said[cohort.clients] = cohort.probability
    deviation = np.sqrt(said * (1 - said) / draws)
    assert np.all(np.abs(counts / draws - said) <= 4.5 * deviation + 1e-12)


@given(
    shares=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12).map(np.array),
    part=st.floats(0.01, 1.0),
)
def test_inclusion_probabilities_sum_to_the_size_and_are_in_proportion_below_one(
    shares: np.ndarray, part: float
) -> None:
    size = part * len(shares)
    probability = inclusion_probabilities(shares, size)
    assert np.all((probability > 0.0) & (probability <= 1.0))
    assert probability.sum() == pytest.approx(size)
    free = probability < 1.0
    if free.sum() > 1:
        ratio = probability[free] / shares[free]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


@pytest.mark.parametrize("sampler", [Uniform(5), Weighted(5)])
def test_fewer_candidates_than_wanted_are_all_taken(sampler: Sampler) -> None:
    seen = seen_by()
    cohort = sampler.sample(np.array([1, 4]), seen, stream(0, "test"))
    assert cohort.clients.tolist() == [1, 4]
    assert cohort.probability.tolist() == [1.0, 1.0]
    assert len(sampler.sample(np.zeros(0, dtype=np.int64), seen, stream(0, "test")).clients) == 0


@pytest.mark.parametrize("sampler", [Uniform(9), Uniform(0), Weighted(9), Independent(9.0), Independent(0.0)])
def test_a_cohort_larger_than_the_fleet_is_one_line_that_names_the_field(sampler: Sampler) -> None:
    with pytest.raises(InputError, match=r"method\.\w*cohort_size: .* is not possible; valid: .*8"):
        sampler.sample(np.arange(8), seen_by(), stream(0, "test"))


def test_candidates_have_data_a_link_and_are_idle() -> None:
    seen = seen_by(np.array([3, 0, 5, 6]))
    links = replace(make_links(4), uplink_gain=np.array([1e-10, 1e-10, 0.0, 1e-10]))
    seen = replace(seen, links=links, idle=np.array([0, 1, 2]))
    assert candidates(seen).tolist() == [0]
    wired = replace(links, fixed_uplink_rate=np.array([0.0, 1e6, 1e6, 1e6]))
    assert candidates(replace(seen, links=wired)).tolist() == [2]
