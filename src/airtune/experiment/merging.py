"""A stored run's model with its adapter merged in."""

from __future__ import annotations

from pathlib import Path

from airtune.errors import InputError
from airtune.experiment.config import read_experiment
from airtune.experiment.store import RunStore
from airtune.files import disk_errors


def merge_run(folder: Path, out: Path) -> None:
    """Write the model of a finished run as one transformers folder (`airtune.training.merge.merge_adapter`).

    Raises
    ------
    InputError : the folder is not a finished run, `out` exists or cannot be written, or the model has no merged form:
        gates and bottleneck adapters act on what passes through them, and a rounded base is not what is loaded here.
    """
    from airtune.training.merge import merge_adapter
    from airtune.training.readers import reader_of

    head = RunStore(folder).read_head()
    export = head.get("export")
    if not export:
        raise InputError(f"{folder}: status is {head.get('status')!r}, nothing was exported; valid: a finished run")
    if export["kind"] != "peft":
        raise InputError(f"{folder}: its adapter acts on more than weights; valid: a run whose export.kind is peft")
    if "base_weights" in export:
        raise InputError(f"{folder}: was trained on {export['base_weights']} weights; valid: a run on full ones")
    if out.exists():
        raise InputError(f"--out: {out} exists; valid: a new folder")
    experiment = read_experiment(head["config"], str(head.get("method")))
    model, adapter = experiment.model, folder / export["path"]
    reader = reader_of(experiment.data, model.name, model.task)
    with disk_errors(out):
        merge_adapter(adapter, model, export["labels"], out, reader=reader)
