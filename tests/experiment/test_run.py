"""Whole runs with real training on a tiny BERT: reproducible, resumable to the bit, honest about what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from airtune.errors import InputError, NoResultError
from airtune.experiment import checkpoint
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import Experiment, read_experiment, read_file
from airtune.experiment.run import Session, Silent, digest, resume, start
from airtune.methods import method_class
from tiny_experiment import head_of, lines_of, write_experiment

SMALL = {"fedbuff": {"method__concurrency": 4, "method__buffer_size": 2}}  # what a fleet of six allows
METHODS = (
    "fedit",
    "hetlora",
    "legend",
    "flora",
    "fedsa-lora",
    "fedbuff",
    "fed-sb",
    "hierfedlora",
    "soft",
    "fedsvd",
    "rolora",
    "rac-lora",
    "tsfa",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(Workshop())


def experiment(file: Path, label: str = "fedit", **changes: Any) -> Experiment:
    return read_file(file).experiment(label, **changes)


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "rounds.jsonl").read_bytes(), (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("label", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    file: Path, session: Session, tmp_path: Path, label: str
) -> None:
    whole, parts, changes = tmp_path / "whole", tmp_path / "parts", SMALL.get(label, {})
    start(experiment(file, label, stop__rounds=5, **changes), whole, session)
    start(experiment(file, label, stop__rounds=2, **changes), parts, session)
    head = resume(parts, {"rounds": "5"}, session)
    assert head["status"] == "done"
    assert contents(whole) == contents(parts)
    assert len(lines_of(whole)) == 6


def test_the_last_rounds_evaluation_is_forgotten_when_the_run_goes_on(
    file: Path, session: Session, tmp_path: Path
) -> None:
    start(experiment(file, stop__rounds=5, evaluation__every=2), tmp_path / "whole", session)
    start(experiment(file, stop__rounds=3, evaluation__every=2), tmp_path / "parts", session)
    assert "accuracy" in lines_of(tmp_path / "parts")[-1]
    resume(tmp_path / "parts", {"rounds": 5}, session)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


class Interrupts(Silent):
    """Presses Ctrl-C after some rounds."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round_done(self, line: dict[str, Any]) -> None:
        if line["round"] == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_goes_on_to_the_bit(file: Path, session: Session, tmp_path: Path, after: int) -> None:
    start(experiment(file, stop__rounds=4), tmp_path / "whole", session)
    with pytest.raises(KeyboardInterrupt):
        start(experiment(file, stop__rounds=4), tmp_path / "parts", replace(session, reporter=Interrupts(after)))
    head = head_of(tmp_path / "parts")
    assert head["status"] == "interrupted"
    assert [line["round"] for line in lines_of(tmp_path / "parts")] == list(range(after + 1))
    resume(tmp_path / "parts", {}, session)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_killed_run_goes_on_to_the_bit(file: Path, session: Session, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from airtune.experiment.config import read_file;"
        "from airtune.experiment.run import Session, start; from airtune.experiment.build import Workshop;"
        f"start(read_file(Path({str(file)!r})).experiment(stop__rounds=5000), Path({str(tmp_path / 'parts')!r}),"
        " Session(Workshop()))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rounds = tmp_path / "parts" / "rounds.jsonl"
    try:
        for _ in range(3000):
            if (rounds.is_file() and rounds.read_bytes().count(b"\n") > 3) or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert head_of(tmp_path / "parts")["status"] == "running", "the process was to be killed in the middle"
    last = rounds.read_bytes().count(b"\n") + 2
    resume(tmp_path / "parts", {"rounds": last}, session)
    start(experiment(file, stop__rounds=last), tmp_path / "whole", session)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_equal_configurations_are_byte_equal_and_another_seed_is_not(
    file: Path, session: Session, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        start(experiment(file, seed=seed), tmp_path / name, Session(Workshop()) if name == "b" else session)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = lines_of(tmp_path / "a"), lines_of(tmp_path / "c")
    drawn = [
        {name: f.A for name, f in build(experiment(file, seed=s), session.workshop).start.adapter.factors.items()}
        for s in (0, 0, 1)
    ]
    for name, factor in drawn[0].items():
        assert torch.equal(factor, drawn[1][name])
        assert not torch.isclose(factor, drawn[2][name]).any(), "the initial A must depend on the seed"
    assert first[0]["loss"] != other[0]["loss"], "the head before training must depend on the seed"
    assert [line["cohort"] for line in first] != [line["cohort"] for line in other]
    examples = [[client["examples"] for client in head_of(tmp_path / name)["fleet"]] for name in "ac"]
    gains = [[client["gain"] for client in head_of(tmp_path / name)["fleet"]] for name in "ac"]
    assert examples[0] != examples[1]
    assert not set(gains[0]) & set(gains[1])


@pytest.fixture(scope="module")
def finished(file: Path, session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    start(experiment(file), folder, replace(session, command="airtune run tiny.toml"))
    yield folder


def test_run_json_holds_what_the_contract_says(file: Path, finished: Path) -> None:
    head = head_of(finished)
    expected = {
        "schema",
        "status",
        "method",
        "seed",
        "metric",
        "direction",
        "config",
        "versions",
        "git",
        "final",
        "export",
    }
    assert expected <= set(head)
    assert (head["status"], head["method"], head["metric"], head["direction"]) == ("done", "fedit", "accuracy", "max")
    assert {"airtune", "python", "torch", "transformers", "peft"} <= set(head["versions"])
    assert head["config"]["training"]["threads"] == 1
    lines = lines_of(finished)
    final = head["final"]
    assert (final["rounds"], final["time_s"], final["accuracy"]) == (2, lines[-1]["time_s"], lines[-1]["accuracy"])
    for name in ("uplink_bits", "downlink_bits", "energy_j"):
        assert final[name] == pytest.approx(sum(line[name] for line in lines))
    assert len(head["fleet"]) == 6
    assert sum(client["examples"] for client in head["fleet"]) == 180
    assert read_experiment(head["config"], "fedit").plain() == head["config"]


def test_rounds_hold_what_the_contract_says_and_no_host_time(finished: Path) -> None:
    lines = lines_of(finished)
    keys = {"round", "time_s", "duration_s", "cohort", "arrived", "dropped", "uplink_bits", "downlink_bits", "energy_j"}
    for number, line in enumerate(lines):
        assert keys | {"train_loss", "clients"} <= set(line)
        assert line["round"] == number
        assert {"accuracy", "loss"} <= set(line)
        assert line["time_s"] == pytest.approx(sum(each["duration_s"] for each in lines[: number + 1]))
        assert len(line["clients"]) == len(line["cohort"])
        for client in line["clients"]:
            parts = sum(client[name] for name in ("download_s", "compute_s", "upload_s", "wait_s"))
            assert parts == pytest.approx(line["duration_s"])
    assert "host" not in (finished / "rounds.jsonl").read_text()
    timings = [json.loads(line) for line in (finished / "timings.jsonl").read_text().splitlines()]
    assert [line["round"] for line in timings] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_adapter_opens_in_peft_with_equal_logits(file: Path, finished: Path) -> None:
    made = read_experiment(head_of(finished)["config"])
    progress = checkpoint.load(finished / "checkpoint", digest(head_of(finished)["config"]))
    bench = build(made, Workshop())
    batch = bench.tokens.test.batch(np.arange(16))
    ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
    bench.federated.show(progress.model)
    base = AutoModelForSequenceClassification.from_pretrained(made.model.name, num_labels=2)
    opened = PeftModel.from_pretrained(base, str(finished / "adapter")).eval()
    with torch.inference_mode():
        ours = bench.federated.logits(ids, mask)
        theirs = opened(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert head_of(finished)["export"]["kind"] == "peft"


def test_a_finished_run_is_not_resumed_without_a_later_end(finished: Path, session: Session) -> None:
    with pytest.raises(InputError, match=r"--resume: .* reached its end .*--stop\.rounds"):
        resume(finished, {}, session)


def test_a_run_folder_that_was_changed_is_refused(finished: Path, session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    head = head_of(folder)
    head["config"]["training"]["learning_rate"] = 0.5
    (folder / "run.json").write_text(json.dumps(head))
    with pytest.raises(InputError, match="another configuration"):
        resume(folder, {"rounds": 9}, session)
    shutil.rmtree(folder / "checkpoint")
    with pytest.raises(InputError, match="no checkpoint"):
        resume(folder, {"rounds": 9}, session)


def test_a_model_that_diverges_ends_the_run_and_keeps_what_there_is(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airtune.experiment import build as building

    calls: list[int] = []

    def lost_at_the_third(*_: Any, **__: Any) -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 0.5, "loss": float("nan") if len(calls) == 3 else 0.7}

    monkeypatch.setattr(building, "evaluate", lost_at_the_third)
    with pytest.raises(NoResultError, match=r"round 2: the model diverged .*training\.learning_rate"):
        start(experiment(file, stop__rounds=5), tmp_path / "run", session)
    head, lines = head_of(tmp_path / "run"), lines_of(tmp_path / "run")
    assert head["status"] == "failed"
    assert "diverged" in head["error"]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert lines[-1]["loss"] is None
    assert checkpoint.load(tmp_path / "run" / "checkpoint", digest(head["config"])).round == 2


def test_clients_that_all_diverge_leave_the_model_as_it_is(file: Path, session: Session, tmp_path: Path) -> None:
    made = experiment(file, training__learning_rate="1e30", training__optimizer="sgd")
    with pytest.raises(NoResultError, match=r"no update .* diverged .*training\.learning_rate"):
        start(made, tmp_path / "run", session)
    head = head_of(tmp_path / "run")
    assert (head["status"], head["final"]["rounds"]) == ("failed", 2)
    assert (tmp_path / "run" / "checkpoint").is_dir()
    first, *rest = lines_of(tmp_path / "run")
    for line in rest:
        assert {lost["reason"] for lost in line["dropped"]} == {"diverged"}
        assert {lost["client"] for lost in line["dropped"]} == set(line["cohort"])
        assert (line["arrived"], line["train_loss"]) == ([], None)
        assert line["loss"] == first["loss"]
        assert line["energy_j"] > 0, "what lost work costs is charged"


def test_a_client_that_diverges_is_named_and_the_round_recorded(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airtune.training.local import LocalTrainer

    honest = LocalTrainer.train

    def sick(self: LocalTrainer, jobs: Any) -> Any:
        first, *rest = honest(self, jobs)
        return [replace(first, reports={**first.reports, "loss": float("nan")}), *rest]

    monkeypatch.setattr(LocalTrainer, "train", sick)
    head = start(experiment(file), tmp_path / "run", session)
    assert head["status"] == "done"
    for line in lines_of(tmp_path / "run")[1:]:
        assert [lost["reason"] for lost in line["dropped"]] == ["diverged"]
        assert line["dropped"][0]["client"] in line["cohort"]
        assert line["dropped"][0]["client"] not in line["arrived"]


def test_a_full_disk_is_no_result_and_the_last_whole_round_stays(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(experiment(file, stop__rounds=4), tmp_path / "whole", session)
    honest, sick = os.fsync, []

    def fsync(handle: int) -> None:
        if sick:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(handle)

    class Fills(Silent):
        def round_done(self, line: dict[str, Any]) -> None:
            sick.extend([True] * (line["round"] == 2))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(NoResultError, match="disk is full"):
            start(experiment(file, stop__rounds=4), tmp_path / "run", replace(session, reporter=Fills()))
    resume(tmp_path / "run", {}, session)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_clients_without_data_never_take_part(file: Path, session: Session, tmp_path: Path) -> None:
    made = experiment(file, data__partition__alpha=0.02, fleet__devices__pixel_8=24, method__cohort_size=8)
    start(made, tmp_path / "run", session)
    empty = {client["client"] for client in head_of(tmp_path / "run")["fleet"] if client["examples"] == 0}
    assert empty
    cohorts = {client for line in lines_of(tmp_path / "run") for client in line["cohort"]}
    assert cohorts
    assert not cohorts & empty


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__name": "bert-nope"}, ("model.name", "minilm")),
        ({"model__target_modules": "qery"}, ("model.target_modules", "query")),
        ({"model__rank": 33}, ("model.rank", "32")),
        ({"model__task": "causal-lm"}, ("model.task", "sequence-classification")),
        ({"data__name": "roten-tomatoes"}, ("data.name", "'rotten-tomatoes'")),
        ({"data__text_column": "txt"}, ("text_column", "txt")),
        ({"data__train_rows": 10**6}, ("data.train_rows", "1000000")),
        (
            {"data__partition__type": "shard", "data__partition": {"type": "shard", "shards_per_client": 99}},
            ("shards",),
        ),
        ({"evaluation__split": "validation"}, ("evaluation.split", "validation_rows")),
        ({"training__device": "cuda:9"}, ("training.device", "cpu")),
        ({"training__device": "gpu"}, ("training.device", "cpu")),
        ({"training__optimizer": "adamm"}, ("training.optimizer", "'adamw'")),
        ({"method__cohort_size": 7}, ("method.cohort_size", "6")),
    ],
)
def test_bad_input_is_one_line_before_the_first_round(
    file: Path, session: Session, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        start(experiment(file, **changes), tmp_path / "run", session)
    assert not (tmp_path / "run").exists()
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("bad", [1, 2])
def test_a_plan_that_breaks_a_constraint_is_bad_input_before_round_1_and_no_result_later(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    kind = method_class("fedit")
    honest = kind.plan

    def plan(self: Any, state: Any, seen: Any, rng: Any) -> Any:
        made = honest(self, state, seen, rng)
        if seen.round != bad:
            return made
        twice = [replace(task, bandwidth=2 * task.bandwidth) for task in made.groups[0].tasks]
        return replace(made, groups=(replace(made.groups[0], tasks=tuple(twice)),))

    monkeypatch.setattr(kind, "plan", plan)
    error = InputError if bad == 1 else NoResultError
    with pytest.raises(error, match=r"^plan: bandwidth" if bad == 1 else r"^round 2: plan: "):
        start(experiment(file), tmp_path / "run", session)
    if bad == 1:
        assert not (tmp_path / "run").exists()
    else:
        assert head_of(tmp_path / "run")["status"] == "failed"
        assert [line["round"] for line in lines_of(tmp_path / "run")] == [0, 1]


def test_the_base_model_is_loaded_once_for_several_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airtune.experiment import build as building

    loads: list[str] = []
    honest = building.load_model

    def counted(config: Any, **options: Any) -> Any:
        loads.append(config.name)
        return honest(config, **options)

    monkeypatch.setattr(building, "load_model", counted)
    shared = Session(Workshop())
    for index, label in enumerate(("fedit", "legend", "slow")):
        start(experiment(file, label, seed=index), tmp_path / label, shared)
    assert len(loads) == 1
