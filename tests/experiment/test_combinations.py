"""Adapters and optimizers that a method cannot carry are refused by name; the others stay."""

from dataclasses import fields

import pytest

from airtune.errors import InputError
from airtune.experiment.combinations import check_combination
from airtune.experiment.config import read_experiment
from airtune.methods import built_in_names, method_class
from airtune.optimizers import LoraPlus
from airtune.training.shapes import ModelConfig
from airtune.types import LocalTraining

NEVER_B = {"fed-sb", "galore-avg"}
ONE_FACTOR = {"ffa-lora", "fedsvd", "galore-avg", "rac-lora", "rolora"}
NOT_ORTHONORMAL = {"ffa-lora", "fedsvd", "rolora"}


TRAINING = [name for name in built_in_names() if "training" in {f.name for f in fields(method_class(name))}]


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_every_method_carries_or_refuses(name):
    plain = method_class(name)()
    galore = method_class(name)(training=LocalTraining(optimizer="galore"))
    check_combination(ModelConfig(adapter="mole" if name == "mole" else "lora"), plain, name)
    if name == "mole":
        return  # it goes with nothing else: see the whole table
    if name in NEVER_B:
        with pytest.raises(InputError, match=rf"model\.adapter: dora.*{name} never trains"):
            check_combination(ModelConfig(adapter="dora"), plain, name)
    else:
        check_combination(ModelConfig(adapter="dora"), plain, name)
    if name in ONE_FACTOR:
        if name in NOT_ORTHONORMAL:
            with pytest.raises(InputError, match=rf"orthonormal columns, and the fixed factor of {name} has none"):
                check_combination(ModelConfig(), galore, name)
        else:
            check_combination(ModelConfig(), galore, name)
        with pytest.raises(InputError, match=r"galore descends the weight itself|never trains"):
            check_combination(ModelConfig(adapter="dora"), galore, name)
    else:
        with pytest.raises(InputError, match=rf"training\.optimizer: galore needs a fixed projector, and {name}"):
            check_combination(ModelConfig(), galore, name)


def test_an_experiment_is_refused_before_anything_is_loaded():
    fleet = {"fleet": {"devices": {"jetson-tx2": 1}}}
    with pytest.raises(InputError, match=r"training\.optimizer: galore"):
        read_experiment({**fleet, "method": "fedit", "training": {"optimizer": "galore"}}, "fedit")
    with pytest.raises(InputError, match=r"model\.adapter: dora"):
        inner = {"name": "fedopt", "method": {"type": "fed-sb"}}
        read_experiment({**fleet, "method": inner, "model": {"adapter": "dora"}}, "fedopt")
    good = {**fleet, "method": "galore-avg", "training": {"optimizer": "galore"}}
    assert read_experiment(read_experiment(good, "galore-avg").plain(), "galore-avg").plain()["method"]
    table = {"optimizer": {"type": "lora-plus", "ratio": 8.0}}
    read = read_experiment({**fleet, "method": "fedit", "model": {"adapter": "dora"}, "training": table}, "fedit")
    assert read_experiment(read.plain(), "fedit") == read
    assert read.model.adapter == "dora" and read.method.training.optimizer == LoraPlus(ratio=8.0)
