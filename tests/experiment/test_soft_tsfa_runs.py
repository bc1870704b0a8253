"""SOFT and TSFA in whole runs: with nothing dropped they are FedIT, and a causal language model trains under them."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from tiny_experiment import WORDS, head_of, lines_of, write_experiment

EVERYONE = 6
NOTHING_DROPPED = {"method__orthogonality_weight": 0.0, "method__compressor": {"type": "soft", "keep_ratio": 1.0}}


@pytest.fixture(scope="module")
def session():
    return Session(Workshop())


def run(file, folder, session, label, **changes):
    start(read_file(file).experiment(label, stop__rounds=3, **changes), folder, session)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def distance(one, other):
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_with_everything_sent_and_no_penalty_soft_and_tsfa_are_fedit(tmp_path, session):
    """The specification's 10.10: keep ratio 1 and lambda = 0 is federated LoRA with separate averaging."""
    file = write_experiment(tmp_path / "tiny")
    plain = run(file, tmp_path / "fedit", session, "fedit", method__cohort_size=EVERYONE)
    soft = run(file, tmp_path / "soft", session, "soft", **NOTHING_DROPPED)
    free = {**NOTHING_DROPPED, "method__pilot_rounds": 0, "method__latency_limit": 1e6}
    tsfa = run(file, tmp_path / "tsfa", session, "tsfa", **free)
    assert distance(plain, soft) <= 1e-6
    assert distance(plain, tsfa) <= 1e-6
    assert all(line["notes"]["mean_keep_ratio"] == 1.0 for line in lines_of(tmp_path / "tsfa")[1:])
    for name in ("soft", "tsfa"):
        wanted = [line["train_loss"] for line in lines_of(tmp_path / "fedit")]
        assert [line["train_loss"] for line in lines_of(tmp_path / name)] == pytest.approx(wanted, abs=1e-6)
        errors = [line["diagnostics"]["drop_error"] for line in lines_of(tmp_path / name)[1:]]
        assert max(errors) < 1e-10  # what the difference loses in fp32
    dropping = run(
        file, tmp_path / "half", session, "soft", **{**NOTHING_DROPPED, "method__compressor__keep_ratio": 0.5}
    )
    assert distance(plain, dropping) > 1e-4  # so the comparison can fail
    for line in lines_of(tmp_path / "half")[1:]:
        measured = line["diagnostics"]
        assert 0.0 < measured["drop_error"] <= measured["drop_error_bound"] * (1 + 1e-9)
        assert 0.0 < measured["drop_error_predicted"] <= measured["drop_error_bound"]


def write_llama(folder):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[UNK]")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, max_position_embeddings=32, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def test_tsfa_trains_a_causal_language_model(tmp_path, session):
    """A random LLaMA of two layers: the pilot chooses a rank, later rounds keep to it, and the loss falls."""
    file = write_experiment(tmp_path / "tiny")
    write_llama(tmp_path / "llama")
    changes = {"model__name": str(tmp_path / "llama"), "model__task": "causal-lm", "training__learning_rate": 2e-2}
    folder = tmp_path / "run"
    run(file, folder, session, "tsfa", **changes)
    lines = lines_of(folder)
    assert head_of(folder)["status"] == "done"
    rank = lines[2]["notes"]["structural_rank"]
    assert lines[1]["notes"]["structural_rank"] == 4 and rank in (1, 2, 4)
    assert lines[3]["notes"]["structural_rank"] == rank
    assert len(lines[1]["notes"]["offline"]["ranks"]) == 3
    assert "accuracy" not in lines[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all({"covariance_norm", "queue_s", "drop_error"} <= set(line["diagnostics"]) for line in lines[1:])
