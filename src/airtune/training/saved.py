"""The result of a run that PEFT cannot express, as a folder of airtune's own; and how to open such a folder.

    from airtune.training.saved import open_adapter

    model = open_adapter("run/adapter")              # base="other/folder" if the base model has moved
    logits = model.logits(input_ids, attention_mask)

``airtune_adapter.json`` holds the `ModelConfig`, the number of classes and the scalings, ``adapter_model.safetensors``
the tensors. With MoLE there is no other way: what weighs the experts depends on the text, so that neither a LoRA nor a
merged weight computes the same, and there is no export of merged weights. Nor is there with bottleneck adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from airtune.errors import InputError
from airtune.lora import Adapter, DenseUpdate, LoraFactors, MergedUpdate
from airtune.training.hardware import Precision
from airtune.training.loading import load_model
from airtune.training.model import FederatedModel
from airtune.training.shapes import ModelConfig, placement_of
from airtune.types import ServerModel

CONFIG, TENSORS, SCHEMA = "airtune_adapter.json", "adapter_model.safetensors", 1


def write_adapter(model: FederatedModel, server: ServerModel, folder: Path) -> None:
    """Write the server's model into an existing folder, for `open_adapter`. Raises OSError if it cannot be written."""
    head = {
        "schema": SCHEMA,
        "model": asdict(model.config),
        "num_labels": model.num_labels,
        "scaling": {slot: factors.scaling for slot, factors in server.adapter.factors.items()},
        "merged_scaling": {m: u.scaling for m, u in server.base_update.items() if isinstance(u, LoraFactors)},
    }
    tensors = {f"{kind}/{owner}": tensor for owner, kind, tensor in server.adapter.tensors()}
    for module, update in server.base_update.items():
        parts = {"dense": update.matrix} if isinstance(update, DenseUpdate) else {"A": update.A, "B": update.B}
        tensors |= {f"merged-{kind}/{module}": tensor for kind, tensor in parts.items()}
    content = {name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(content, str(folder / TENSORS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(head, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_adapter(
    folder: Path | str, *, base: str | None = None, precision: Precision = "fp32", device: str = "cpu"
) -> FederatedModel:
    """Return the base model with the adapter of a folder on it, frozen, ready for `FederatedModel.logits`.

    Parameters
    ----------
    folder : ``adapter/`` of a run whose run.json says ``"kind": "airtune"``.
    base : name or folder of the base model; None: as the run named it.
    precision, device : as for a run. ``model.network`` is the transformers model.

    Raises
    ------
    InputError : the folder is not one of ours, or the base model is not there or does not fit.
    """
    folder = Path(folder)
    try:
        head: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / TENSORS))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no adapter of airtune's own ({error}); valid: a folder with {CONFIG}") from error
    if head.get("schema") != SCHEMA:
        raise InputError(f"{folder}: adapter of schema {head.get('schema')}; this version reads {SCHEMA}")
    config = ModelConfig(**head["model"])
    config = replace(config, name=base or config.name, target_modules=tuple(config.target_modules))
    model = load_model(config, num_labels=head["num_labels"], precision=precision, device=device)
    model.show(_server(model, tensors, head))
    return model


def _server(model: FederatedModel, tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> ServerModel:
    typed = {name: tensor.to(model.dtype) for name, tensor in tensors.items()}
    factors = {
        slot: LoraFactors(typed[f"A/{slot}"], typed[f"B/{slot}"], scaling, typed.get(f"core/{slot}"))
        for slot, scaling in head["scaling"].items()
    }
    shape = model.shape_with({slot: f.rank for slot, f in factors.items()})
    merged: dict[str, MergedUpdate] = {
        module: LoraFactors(typed[f"merged-A/{module}"], typed[f"merged-B/{module}"], scaling)
        for module, scaling in head["merged_scaling"].items()
    }
    dense = "merged-dense/"
    merged |= {n.removeprefix(dense): DenseUpdate(t) for n, t in typed.items() if n.startswith(dense)}
    adapter = Adapter(
        factors={slot: factors[slot] for slot in shape.slots},
        placement=placement_of(shape),
        layer={name: slot.layer for name, slot in shape.slots.items()},
        num_layers=shape.num_layers,
        extras={name: typed[f"extra/{name}"] for name in shape.extras},
    )
    return ServerModel(adapter, merged)
