"""A merged model is an ordinary transformers folder that computes what the federation's model does."""

import pytest
import torch
import transformers

from airtune.cli import main
from airtune.errors import InputError
from airtune.lora import merge
from airtune.training.export import export_adapter
from airtune.training.images import ImageReader
from airtune.training.merge import merge_adapter
from airtune.training.shapes import ModelConfig
from airtune.types import ServerModel
from tiny_experiment import head_of, write_experiment
from tiny_images import write_model
from tiny_networks import federated, network, random_adapter, rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
OPENER = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}


@pytest.mark.parametrize(
    ("family", "task", "kind"),
    [
        ("bert", "sequence-classification", "lora"),
        ("bert", "sequence-classification", "dora"),
        ("gpt2", "sequence-classification", "dora"),
        ("mpnet", "sequence-classification", "msp-lora"),
        ("llama", "sequence-classification", "rslora"),
        ("llama", "causal-lm", "lora"),
        ("gpt2", "causal-lm", "msp-lora"),
        ("vit", "image-classification", "lora"),
    ],
)
def test_transformers_alone_gives_the_same_logits(family, task, kind, tmp_path):
    model = federated(family, task, adapter=kind)
    adapter = random_adapter(model, 4)
    base_update = {}
    if kind == "lora":
        module = next(iter(adapter.placement))
        base_update = {module: merge(None, random_adapter(model, 9).factors[module])}
    server = ServerModel(adapter, base_update)
    export_adapter(model, server, tmp_path / "adapter")
    network(family, task).save_pretrained(tmp_path / "base")
    labels = [] if task == "causal-lm" else [f"class {n}" for n in range(model.num_labels)]
    config = ModelConfig(name=str(tmp_path / "base"), rank=4, task=task, adapter=kind)
    merge_adapter(tmp_path / "adapter", config, labels, tmp_path / "whole")
    opened = OPENER[task].from_pretrained(tmp_path / "whole").eval()
    batch = {name: torch.from_numpy(values) for name, values in rows(task, 6).batch(range(6)).items()}
    model.show(server)
    with torch.no_grad():
        ours, theirs = model.output(batch), opened(**model.inputs.arguments(batch)).logits
    assert torch.allclose(ours, theirs.to(ours), atol=1e-5)
    assert not labels or list(opened.config.id2label.values()) == labels


def test_the_command_merges_a_finished_run_and_only_into_a_new_folder(tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["run", str(write_experiment(tmp_path / "task")), "--out", str(run), "--stop.rounds", "1"]) == 0
    assert main(["merge", str(run), "--out", str(whole)]) == 0
    classify = transformers.pipeline("text-classification", model=str(whole), device="cpu")
    assert classify("a good film")[0]["label"] in head_of(run)["export"]["labels"]
    capsys.readouterr()
    for words in ([str(run), "--out", str(whole)], [str(run)], [str(tmp_path), "--out", str(tmp_path / "other")]):
        assert main(["merge", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "task", "whole"]


def test_a_reader_that_cannot_write_leaves_nothing(tmp_path):
    class Broken:
        def save(self, folder):
            raise OSError("full")

    model = federated("bert")
    export_adapter(model, ServerModel(random_adapter(model, 4)), tmp_path / "adapter")
    network("bert").save_pretrained(tmp_path / "base")
    config = ModelConfig(name=str(tmp_path / "base"), rank=4)
    with pytest.raises(OSError, match="full"):
        merge_adapter(tmp_path / "adapter", config, ["a", "b", "c"], tmp_path / "whole", reader=Broken())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_image_processor_is_written_beside_the_weights(tmp_path):
    write_model(tmp_path / "base")
    ImageReader(str(tmp_path / "base")).save(tmp_path / "whole")
    ours, theirs = (transformers.AutoImageProcessor.from_pretrained(tmp_path / name) for name in ("base", "whole"))
    assert ours.to_dict() == theirs.to_dict()


def test_what_has_no_merged_form_is_refused(tmp_path):
    model = federated("bert", adapter="bottleneck")
    export_adapter(model, ServerModel(model.initial_adapter(0)), tmp_path / "adapter")
    with pytest.raises(InputError, match="is no PEFT folder"):
        merge_adapter(tmp_path / "adapter", ModelConfig(name="minilm", adapter="bottleneck"), ["a"], tmp_path / "whole")
