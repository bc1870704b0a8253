"""The measured rate of a link: bytes over the time they took beyond an empty question, bounded by Flower's polling."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, RecordDict

from airtune.deploy.flower.codec import PayloadError, from_record
from airtune.deploy.flower.facts import Facts, read_facts, write_facts
from airtune.deploy.flower.probe import BYTES, LARGEST, RESOLUTION, Probe, answer

FACTS = Facts(0, "box", 10, 12.0, False, 1e9, 1e9, 0.0, 0.0, "{}")


def measured(empty: float, down: float, up: float, facts: Facts = FACTS) -> Facts:
    probe, now = Probe(facts), 5.0
    assert probe.wanted
    for seconds, (carried, wanted) in zip((empty, down, up), ((0, 0), (BYTES, 0), (0, BYTES)), strict=True):
        question = probe.question(now)
        assert len(from_record(question.array_records["bytes"])["bytes"]) == carried
        assert len(from_record(answer(question).array_records["bytes"])["bytes"]) == wanted
        now += seconds
        probe.answered(now)
    assert probe.done
    return probe.result()


def test_rates_are_bytes_over_the_time_beyond_an_empty_question() -> None:
    found = measured(4.0, 4.0 + 16.0, 4.0 + 64.0)
    assert found.downlink_rate == pytest.approx(8 * BYTES / 16.0)
    assert found.uplink_rate == pytest.approx(8 * BYTES / 64.0)


def test_a_fast_link_is_reported_by_the_bound_that_polling_allows() -> None:
    found = measured(4.0, 3.0, 4.5)
    assert found.downlink_rate == found.uplink_rate == pytest.approx(8 * BYTES / RESOLUTION)


def test_what_the_node_gave_is_kept() -> None:
    given = Facts(0, "box", 10, 12.0, False, 1e9, 1e9, 5e5, 0.0, "{}")
    assert measured(1.0, 9.0, 9.0, given).uplink_rate == 5e5
    assert not Probe(Facts(0, "box", 10, 12.0, False, 1e9, 1e9, 5e5, 1e6, "{}")).wanted


@pytest.mark.parametrize("up", [-1, LARGEST + 1, 1.5, "many"])
def test_impossible_questions_are_refused(up: object) -> None:
    with pytest.raises(PayloadError):
        answer(RecordDict({"probe": ConfigRecord({"up": up})}))


def test_facts_come_back_and_impossible_ones_are_refused() -> None:
    assert read_facts(write_facts(FACTS)) == FACTS
    for name, value in (("client", -1), ("tokens", float("nan")), ("examples", 1.5), ("own_data", 1)):
        content = write_facts(FACTS)
        content["facts"] = ConfigRecord({**content.config_records["facts"], name: value})
        with pytest.raises(PayloadError, match=name):
            read_facts(content)
