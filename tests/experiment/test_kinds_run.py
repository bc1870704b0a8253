"""Every kind of adapter and every optimizer, named in an experiment: it runs, resumes to the bit, and opens in PEFT."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from airtune.experiment import checkpoint
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, digest, resume, start
from tiny_experiment import head_of, lines_of, write_experiment

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CHOICES = [
    ("fedit", "dora", "lora-rite"),
    ("fedit", "msp-lora", "lora-plus"),
    ("flora", "dora", "adamw"),
    ("flora", "beam-lora", "lora-pro"),
    ("galore-avg", "rslora", "galore"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def session():
    return Session(Workshop())


@pytest.mark.parametrize(("label", "adapter", "optimizer"), CHOICES)
def test_a_run_resumes_and_opens(file, session, tmp_path, label, adapter, optimizer):
    def chosen(rounds):
        return read_file(file).experiment(
            label,
            model__adapter=adapter,
            training__optimizer=optimizer,
            training__local_steps=4,
            training__beam__every=2,
            training__beam__first_share=0.8,
            stop__rounds=rounds,
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(chosen(3), whole, session)
    start(chosen(1), parts, session)
    assert resume(parts, {"rounds": 3}, session)["status"] == "done"
    assert lines_of(whole) == lines_of(parts) and len(lines_of(whole)) == 4
    assert all(np.isfinite(line["loss"]) for line in lines_of(whole))
    assert lines_of(whole)[-1]["loss"] != lines_of(whole)[0]["loss"]
    bench = build(chosen(3), session.workshop)
    progress = checkpoint.load(whole / "checkpoint", digest(head_of(whole)["config"]))
    base = AutoModelForSequenceClassification.from_pretrained(bench.experiment.model.name, num_labels=2)
    opened = PeftModel.from_pretrained(base, str(whole / "adapter")).eval()
    batch = bench.tokens.test.batch(range(8))
    ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
    bench.federated.show(progress.model)
    with torch.no_grad():
        ours, theirs = bench.federated.logits(ids, mask), opened(input_ids=ids, attention_mask=mask).logits
    assert (ours - theirs).abs().max() <= 1e-5
