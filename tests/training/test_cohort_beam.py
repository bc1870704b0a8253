"""BeamLoRA in the cohort engine against the readable twin: the same gates, the same components replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.lora import ONLY_B, AdapterSlice
from airtune.training.beam import Search
from airtune.training.cohort.trainer import CohortTrainer
from airtune.training.local import LocalTrainer
from airtune.types import Beam, LocalTraining, OrthogonalityPenalty, ProximalPenalty, ServerModel, TailPenalty
from cohort_jobs import CLIENTS, job, slices, worst_distance
from tiny_networks import federated, random_adapter, tokens

FAMILIES = (
    ("bert", "sequence-classification"),
    ("mpnet", "sequence-classification"),
    ("gpt2", "sequence-classification"),
    ("llama", "causal-lm"),
)
TRAINED = ("full", "unequal ranks", "depth, frozen below", "depth, absent below", "sketch", "other components frozen")
BEAMS = (
    Beam(every=2, first_share=0.5),
    Beam(every=3, first_share=0.7, temperature=0.03),
    Beam(every=5, first_share=0.6, temperature=0.1),
)
STEPS = (7, 12, 10)


class Pair:
    """Both engines on one model, and what their searches have chosen."""

    def __init__(self, family: str = "bert", task: str = "sequence-classification", precision: Any = "fp64") -> None:
        self.model = federated(family, task, precision=precision, adapter="beam-lora")
        self.server = ServerModel(random_adapter(self.model, 4))
        self.data = tokens(task=task)
        self.twin = LocalTrainer(self.model, self.data, CLIENTS, 7)
        self.cohort = CohortTrainer(self.model, self.data, CLIENTS, 7)

    def jobs(self, kind: str = "full", **training: Any) -> list[Any]:
        parts = enumerate(slices(self.server, kind))
        return [
            job(self.server, k, *part, **{"beam": BEAMS[k], "local_steps": STEPS[k], **training}) for k, part in parts
        ]


_PAIRS: dict[tuple[str, ...], Pair] = {}


def pair(*which: str) -> Pair:
    if which not in _PAIRS:
        _PAIRS[which] = Pair(*which)
    return _PAIRS[which]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every search adds (steps, step, slot, pruned, copied)."""
    found: list[Any] = []
    choose = Search._choose  # pyright: ignore[reportPrivateUsage]

    def noted(self: Search, step: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        result = choose(self, step)
        found.extend((self.steps, step, slot, p.tolist(), c.tolist()) for slot, (p, c) in result.items())
        return result

    monkeypatch.setattr(Search, "_choose", noted)
    return found


def apart(engine: Any, both: Pair, jobs: list[Any], chosen: list[Any], least: int = 1) -> float:
    """Return how far both engines are apart; the components that they replaced must be the same, and some."""
    twins = both.twin.train(jobs)
    wanted = sorted(chosen)
    chosen.clear()
    found = engine.train(jobs)
    assert sorted(chosen) == wanted and sum(len(each[3]) for each in wanted) >= least
    assert all(t.reports["replaced"] == w.reports["replaced"] for t, w in zip(found, twins, strict=True))
    chosen.clear()
    return worst_distance(found, twins)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_every_slice_of_every_family_competes_as_alone(family: str, task: str, kind: str, chosen: list[Any]) -> None:
    both = pair(family, task)
    assert apart(both.cohort, both, both.jobs(kind), chosen, least=3) < 1e-7


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lora-plus", "lora-pro"])
@pytest.mark.parametrize("kind", ["full", "unequal ranks", "sketch"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_optimizer_moves_its_moments_as_alone(family: str, kind: str, optimizer: str, chosen: list[Any]) -> None:
    both = pair(family)
    momentum = 0.5 if optimizer == "sgd" else 0.0
    jobs = both.jobs(kind, optimizer=optimizer, momentum=momentum, weight_decay=0.02, learning_rate=3e-3)
    assert apart(both.cohort, both, jobs, chosen) < 1e-6


@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_single_precision_agrees_to_five_digits(family: str, task: str, chosen: list[Any]) -> None:
    both = pair(family, task, "fp32")
    for kind in TRAINED:
        jobs = both.jobs(kind, optimizer="sgd", learning_rate=0.01)
        assert apart(both.cohort, both, jobs, chosen) < 1e-5


def test_penalties_clipping_dropout_and_small_micro_batches(chosen: list[Any]) -> None:
    both = pair("bert")
    tail = TailPenalty(0.1, dict.fromkeys(both.server.adapter.factors, 1))
    for penalties in ((ProximalPenalty(0.3), OrthogonalityPenalty(0.1, "cosine")), (tail,)):
        jobs = both.jobs("unequal ranks", penalties=penalties, max_grad_norm=0.2, lora_dropout=0.2)
        assert apart(both.cohort, both, jobs, chosen) < 1e-7
        small = CohortTrainer(both.model, both.data, CLIENTS, 7, micro_batch_tokens=20)
        assert apart(small, both, jobs, chosen) < 1e-7


def test_threads_checkpointing_and_several_models_change_nothing(chosen: list[Any]) -> None:
    both = pair("bert")
    other = ServerModel(random_adapter(both.model, 9))
    jobs = both.jobs("sketch") + [replace(j, round=2) for j in both.jobs("unequal ranks")]
    jobs += [replace(j, model=other, cycle=1) for j in both.jobs("depth, frozen below")]
    engines = [
        CohortTrainer(both.model, both.data, CLIENTS, 7, threads=2),
        CohortTrainer(both.model, both.data, CLIENTS, 7, checkpointing=True),
    ]
    assert all(apart(engine, both, jobs, chosen) < 1e-7 for engine in engines)


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cohort_competes_as_alone(data: st.DataObject) -> None:
    both = pair("bert")
    shape = both.server.adapter.shape

    def one(client: int) -> Any:
        ranks = {slot: data.draw(st.integers(0, 4)) for slot in shape.slots}
        train = AdapterSlice.truncation(shape, ranks)
        train = replace(train, outside=data.draw(st.sampled_from(["absent", "frozen"])))
        beam = Beam(data.draw(st.integers(2, 4)), data.draw(st.floats(0.3, 1.0)), data.draw(st.floats(0.02, 0.2)))
        numbers = {
            "local_steps": data.draw(st.integers(1, 9)),
            "batch_size": data.draw(st.integers(1, 6)),
            "learning_rate": data.draw(st.floats(1e-4, 1e-2)),
            "optimizer": data.draw(st.sampled_from(["adamw", "sgd"])),
            "max_grad_norm": data.draw(st.sampled_from([None, 0.5])),
        }
        return job(both.server, client, train, AdapterSlice.everything(shape), beam=beam, **numbers)

    jobs = [one(client) for client in data.draw(st.permutations(range(3)))]
    engine = CohortTrainer(both.model, both.data, CLIENTS, 7, micro_batch_tokens=data.draw(st.integers(12, 200)))
    assert worst_distance(engine.train(jobs), both.twin.train(jobs)) < 1e-6


def test_bf16_competes_too() -> None:
    """No equality to digits there; gates are kept in single precision and what is sent has them folded in."""
    both = pair("bert", "sequence-classification", "bf16")
    found = both.cohort.train(both.jobs(learning_rate=1e-3))
    wanted = both.twin.train(both.jobs(learning_rate=1e-3))
    assert all(t.values.factors[s].B.dtype == torch.float32 for t in found for s in t.values.factors)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.reports["loss"] == pytest.approx(other.reports["loss"], rel=0.02)
        assert mine.reports["replaced"] > 0


def test_a_diverged_client_is_lost_and_the_others_search_on(chosen: list[Any]) -> None:
    both = pair("bert", "sequence-classification", "fp32")
    sane = both.jobs(optimizer="sgd")[:2]
    lost = job(both.server, 2, optimizer="sgd", learning_rate=1e30, local_steps=9, beam=BEAMS[0])
    first = job(both.server, 2, optimizer="sgd", learning_rate=np.inf, local_steps=9, beam=BEAMS[0], round_index=2)
    found, twins = (engine.train([sane[0], lost, sane[1], first]) for engine in (both.cohort, both.twin))
    assert worst_distance([found[0], found[2]], [twins[0], twins[2]]) < 1e-5
    for place in (1, 3):
        assert np.isnan(found[place].reports["loss"]) and found[place].reports.keys() == twins[place].reports.keys()


def test_a_head_alone_has_no_gates_and_one_factor_alone_is_refused() -> None:
    both = pair("bert")
    jobs = both.jobs("head alone")
    found = both.cohort.train(jobs)
    assert worst_distance(found, both.twin.train(jobs)) < 1e-9 and "replaced" not in found[0].reports
    for engine in (both.cohort, both.twin):
        with pytest.raises(InputError, match="one of which is not trained"):
            engine.train([job(both.server, 0, AdapterSlice.everything(both.server.adapter.shape, ONLY_B))])
        with pytest.raises(InputError, match="lora-rite does not have"):
            engine.train([job(both.server, optimizer="lora-rite")])
    with pytest.raises(InputError, match="lora-rite does not have"):
        both.cohort.check(LocalTraining(optimizer="lora-rite"))
