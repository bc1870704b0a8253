"""Whole runs on images: SOFT and TSFA on a vision transformer, what its rows cost, and its model opened elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from airtune.cli import main
from airtune.compression.dense import Dense
from airtune.errors import InputError
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import read_file
from airtune.experiment.evaluation import evaluate_run
from airtune.experiment.run import Session, start
from airtune.lora import AdapterSlice
from airtune.training.data import DataConfig, load
from airtune.training.images import ImageData, ImageReader
from airtune.training.losses import mean_loss
from airtune.types import ClientTask, LocalTraining
from tiny_experiment import lines_of
from tiny_images import write_image_experiment, write_images

PLACES = 5  # 4 patches and the class token


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop()


def images(file: Path) -> ImageData:
    """Return the training images as the model takes them."""
    rows = load(DataConfig(name=str(file.parent / "rows.jsonl")), task="image-classification")
    return ImageReader(str(file.parent / "model")).read(rows.train, rows.label_names)


@pytest.mark.parametrize(("method", "engine"), [("soft", "twin"), ("tsfa", "twin"), ("tsfa", "cohort")])
def test_soft_and_tsfa_run(file: Path, tmp_path: Path, workshop: Workshop, method: str, engine: str) -> None:
    changes = {"training.engine": engine, "training.local_steps": "6", "stop.rounds": "2"}
    start(read_file(file, changes).experiment(method), tmp_path / "run", Session(workshop))
    first, *_, last = lines_of(tmp_path / "run")
    (model,) = workshop.models.values()
    whole = 32 * AdapterSlice.everything(model.shape).num_values(model.shape)
    assert 0 < last["uplink_bits"] < whole * len(last["cohort"])
    assert np.isfinite(last["loss"]) and last["loss"] != first["loss"]


def test_the_engines_agree_over_whole_rounds(file: Path, tmp_path: Path, workshop: Workshop) -> None:
    for engine in ("twin", "cohort"):
        changes = {"training.engine": engine, "training.optimizer": "sgd"}
        start(read_file(file, changes).experiment("fedit"), tmp_path / engine, Session(workshop))
    for one, other in zip(lines_of(tmp_path / "twin"), lines_of(tmp_path / "cohort"), strict=True):
        assert one["time_s"] == other["time_s"] and other["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_costs_are_what_torch_counts_and_the_backward_pass_stops_at_the_depth(file: Path, workshop: Workshop) -> None:
    """Batches of four through the real network, for every depth: forward and backward FLOPs of the cost model."""
    bench = build(read_file(file, {}).experiment("fedit"), workshop)
    model, rows = bench.federated, bench.tokens.train
    model.network.set_attn_implementation("eager")  # what the counter sees, and the formulas mean
    assert bench.cell.costs.tokens == pytest.approx([PLACES] * 6)
    batch = {name: torch.from_numpy(values) for name, values in rows.batch(range(4)).items()}
    client = int(np.argmax([len(part) for part in bench.clients]))
    batches = math.ceil(len(bench.clients[client]) / 4)
    share = len(bench.clients[client]) / (4 * batches)  # of a full batch: a pass over the rows may end with fewer
    backward: list[float] = []
    for depth in (1, 2):
        train = AdapterSlice.top_layers(model.shape, depth, "absent")
        training = LocalTraining(local_steps=1, batch_size=4)
        task = ClientTask(client, train, train, train, training, Dense(), bandwidth=1e5, transmit_power=0.1)
        active = model.activate(bench.start, train)
        with FlopCounterMode(display=False) as counter:
            loss = mean_loss(model.output(batch), batch["labels"])
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert all(tensor.grad is not None for _, _, tensor in active.trained())
        assert all(module.split(".")[2] >= str(2 - depth) for module in active.adapter.placement)
        counted = bench.cell.costs.compute_flops(task)
        assert counted[0] == pytest.approx(share * forward, rel=0.005)
        assert counted[1] == pytest.approx(share * counter.get_total_flops(), rel=0.02)
        backward.append(counter.get_total_flops())
    assert backward[0] < 0.6 * backward[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_exported_folder_opens_in_peft_and_evaluates(
    file: Path, tmp_path: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone and merged into the base, PEFT computes the logits of the run's model; `airtune evaluate` measures it."""
    experiment = read_file(file, {"training.local_steps": "6"}).experiment("fedit")
    start(experiment, tmp_path / "run", Session(workshop))
    found = evaluate_run(tmp_path / "run", None, workshop)  # leaves the run's model on the network
    assert found["rows"] == 40 and found["accuracy"] == lines_of(tmp_path / "run")[-1]["accuracy"]
    (model,) = workshop.models.values()
    batch = {name: torch.from_numpy(values) for name, values in images(file).batch(range(8)).items()}
    with torch.no_grad():
        ours = model.output(batch)
    base = AutoModelForImageClassification.from_pretrained(
        file.parent / "model", num_labels=2, attn_implementation="eager"
    )
    with torch.no_grad():
        bare = base(pixel_values=batch["pixel_values"]).logits
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    with torch.no_grad():
        opened = theirs(pixel_values=batch["pixel_values"]).logits
        merged = theirs.merge_and_unload()(pixel_values=batch["pixel_values"]).logits
    assert torch.allclose(opened, ours, atol=1e-5) and torch.allclose(merged, ours, atol=1e-5)
    assert float((ours - bare).abs().max()) > 1e-3
    write_images(tmp_path / "other.jsonl", 30)
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--data", str(tmp_path / "other.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 30


def test_a_plan_needs_no_training(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--method", "tsfa", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]["assumed"]
    assert not any("tokens" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.task": "sequence-classification"},
            "data.text_column: .* no column 'text'; its columns: pixels, label",
        ),
        ({"data.image_column": "picture"}, "data.image_column: .* no column 'picture'; its columns: pixels, label"),
        (
            {"data.name": "rotten-tomatoes"},
            "data.name: 'rotten-tomatoes' (is not in|has text.* needs pixels)",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(file: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(read_file(file, changes).experiment("fedit"), Workshop())
    assert "\n" not in str(caught.value)


def test_a_model_that_was_not_made_names_the_command_that_makes_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text("")
    folder = tmp_path / "vit"
    with pytest.raises(InputError, match=f"no folder '{folder}'; make it with: python .*pretrain.py --out {folder}$"):
        build(read_file(file, {"model.name": str(folder)}).experiment("fedit"), Workshop())


def test_pretraining_clients_and_test_rows_share_no_image(fetched) -> None:
    fetched("digits-0-4")
    fetched("digits-5-9")
    before, after = (load(DataConfig(name=f"digits-{part}"), task="image-classification") for part in ("0-4", "5-9"))
    parts = [before.train, before.test, after.train, after.test]
    images = [{json.dumps(image) for image in part["pixels"][:]} for part in parts]
    assert [len(found) for found in images] == [len(part) for part in parts]
    assert sum(len(found) for found in images) == len(set().union(*images)) == 1797


def test_the_reader_gives_what_the_processor_says(file: Path) -> None:
    rows, made = load(DataConfig(name=str(file.parent / "rows.jsonl")), task="image-classification"), images(file)
    values = np.array(rows.train["pixels"][:], dtype=np.float64)[:, None]
    np.testing.assert_allclose(made.pixels, (values / 16 - 0.5) / 0.5, atol=1e-6)
    assert made.lengths.tolist() == [PLACES] * len(rows.train) and made.label_names == ("left", "right")
    assert made.labels.tolist() == rows.train["label"][:]
    whole = ImageReader("").stored(made.arrays, made.fields)
    assert whole.select([3, 1]).pixels.tolist() == made.pixels[[3, 1]].tolist() and whole.fields == made.fields


BLANK, TWO = [[0] * 8] * 8, [[[1, 1]] * 8] * 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([BLANK, [[1, 2], [3]]], "data.image_column: row 2 of .* has no pixels in column 'pixels'"),
        (["a text"] * 2, "data.image_column: row 1 of .* has no pixels"),
        (
            [BLANK, [[1] * 6] * 6],
            "data.image_column: an image has 6 x 6 pixels, the model takes 8 x 8; valid: ",
        ),
        ([TWO] * 4, "data.image_column: an image has 2 channels; valid: 1"),
    ],
)
def test_images_that_do_not_fit_are_one_line(file: Path, tmp_path: Path, rows: list[object], message: str) -> None:
    lines = [json.dumps({"pixels": image, "label": i % 2}) for i, image in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message) as caught:
        read = load(DataConfig(name=str(tmp_path / "rows.jsonl")), task="image-classification")
        for part in (read.train, read.test):
            ImageReader(str(file.parent / "model")).read(part, read.label_names)
    assert "\n" not in str(caught.value)


def test_images_of_the_hub_are_read_as_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    table = datasets.Dataset.from_dict({"img": [Image.fromarray(array) for array in drawn], "label": [0, 1, 0, 1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": table})
    read = load(DataConfig(name="owner/pictures", image_column="img"), task="image-classification")
    found = [np.asarray(image) for part in (read.train, read.test) for image in part["pixels"][:]]
    assert sorted(map(np.ndarray.tolist, found)) == sorted(drawn.tolist())
