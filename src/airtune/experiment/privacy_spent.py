"""What a run with noise has spent: epsilon and delta for run.json, from its rounds and its configuration.

It is an upper bound for what leaves the server (client privacy) or a client (DP-SGD), under the assumptions of
`airtune.aggregation.privacy`. The deltas are ours [choice]: 1e-5, or a tenth of one over the number of clients, or of
the client's examples, where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from airtune.aggregation.privacy import ClientPrivacy, epsilon
from airtune.devices.availability import Always
from airtune.errors import InputError
from airtune.experiment.combinations import layers_of, rules_of
from airtune.experiment.config import Experiment
from airtune.methods.hierfedlora import HierFedLoRA
from airtune.scheduling.sampling import Independent
from airtune.types import SamplePrivacy

Plain = dict[str, Any]
Accountant = Callable[[float, int, float, float], float]


def privacy_spent(
    experiment: Experiment, examples: Sequence[int], lines: Sequence[Mapping[str, Any]], account: Accountant = epsilon
) -> Plain:
    """Return ``{"privacy": {"clients": ..., "examples": ...}}`` with what is on, or nothing without noise.

    Parameters
    ----------
    examples : [clients]. lines : of rounds.jsonl, round 0 included. account : noise multiplier, repetitions, sampling
        probability, delta -> epsilon.
    """
    played, found = [line for line in lines if line["round"] > 0], Plain()
    *_, method = layers_of(experiment.method)
    rule = next((r for r in rules_of(method) if isinstance(r, ClientPrivacy)), None)
    if rule is not None:
        found["clients"] = _of_clients(experiment, rule, examples, played, account)
    if (noise := experiment.training.privacy) is not None:
        found["examples"] = _of_examples(experiment, noise, examples, played, account)
    return {"privacy": found} if found else {}


def _of_clients(
    experiment: Experiment, rule: ClientPrivacy, examples: Sequence[int], played: Sequence[Any], account: Accountant
) -> Plain:
    """Return the budget of the rounds in which anything was aggregated."""
    rounds = sum(1 for line in played if line["arrived"])
    numbers = {
        "delta": min(1e-5, 0.1 / max(sum(n > 0 for n in examples), 1)),
        "noise_multiplier": rule.noise_multiplier,
        "rounds": rounds,
        "sampling_probability": _probability(experiment, examples, played),
    }
    return _with_epsilon(numbers, rounds, account)


def _of_examples(
    experiment: Experiment, noise: SamplePrivacy, examples: Sequence[int], played: Sequence[Any], account: Accountant
) -> Plain:
    """Return the budget of the client that spent most; its rounds are those in which its update arrived."""
    if any(isinstance(layer, HierFedLoRA) for layer in layers_of(experiment.method)):
        return {"epsilon": None, "reason": "groups train several cycles in a round, which are not counted here"}
    worst: Plain = {"epsilon": 0.0, "reason": "nobody's update arrived"}
    for count, rounds in sorted(_shares(examples, played)):
        training, steps = experiment.training, rounds * experiment.training.steps(count)
        numbers: Plain = {
            "delta": min(1e-5, 0.1 / count),
            "noise_multiplier": noise.noise_multiplier,
            "steps": steps,
            "sampling_probability": min(1.0, training.batch_size / count),
            "examples": count,
        }
        spent = _with_epsilon(numbers, steps, account)
        if spent["epsilon"] is None:
            return spent
        worst = max(worst, spent, key=lambda one: one["epsilon"])
    return worst


def _shares(examples: Sequence[int], played: Sequence[Any]) -> set[tuple[int, int]]:
    """Return (examples, rounds) of the clients that took part, each pair once."""
    clients, rounds = np.unique([client for line in played for client in line["arrived"]], return_counts=True)
    return {(int(examples[int(c)]), int(n)) for c, n in zip(clients, rounds, strict=True)}


def _probability(experiment: Experiment, examples: Sequence[int], played: Sequence[Any]) -> float:
    """Return the probability with which a client was in a cohort, 1 unless all were drawn alike and independently."""
    sampler = getattr(getattr(experiment.method, "planner", None), "sampler", None)
    always = isinstance(experiment.fleet.availability, Always) and experiment.fleet.battery is None
    if not (isinstance(sampler, Independent) and sampler.by == "uniform" and always):
        return 1.0
    too_small = [len(line.get("notes", {}).get("too_little_memory", [])) for line in played]
    candidates = sum(n > 0 for n in examples) - max(too_small, default=0)
    return min(1.0, sampler.expected_cohort_size / max(candidates, 1))


def _with_epsilon(numbers: Plain, repetitions: int, account: Accountant) -> Plain:
    """Return the numbers with their epsilon, 0 if nothing was released; None with a reason where it is not known."""
    if repetitions == 0:
        return {"epsilon": 0.0, **numbers}
    try:
        spent = account(numbers["noise_multiplier"], repetitions, numbers["sampling_probability"], numbers["delta"])
    except InputError as error:
        return {"epsilon": None, "reason": str(error), **numbers}
    if not math.isfinite(spent):
        return {"epsilon": None, "reason": "no finite epsilon bounds it", **numbers}
    return {"epsilon": spent, **numbers}
