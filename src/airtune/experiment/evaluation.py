"""Measuring a stored run's model again: on its test rows or on others, over all rows and over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from airtune.errors import InputError
from airtune.experiment import checkpoint
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import read_experiment
from airtune.experiment.run import digest
from airtune.experiment.store import Plain, RunStore
from airtune.federation import Progress
from airtune.lora import AdapterSlice, has_own, with_own
from airtune.training.evaluation import Scores, client_metrics, client_spread, score
from airtune.training.examples import Examples
from airtune.training.partition import Indices
from airtune.training.readers import reader_of
from airtune.training.sources import CONTENT, read_labelled_file


def evaluate_run(folder: Path, file: str | None, workshop: Workshop) -> Plain:
    """Return the metrics of a run's model, as ``airtune evaluate --json`` prints them.

    The spread over clients is that of the test rows, dealt out to clients by the run's own partitioner and seed, so
    that a client's rows have its mix of labels [our choice: clients have no test rows of their own]. Where clients keep
    a part of the model (FedSA-LoRA, MoLE's personal gates), "personal" holds the same for their own models: the mean
    over the clients that have one and rows, each on its rows, and that of the shared model on the same rows. All other
    numbers are those of the shared model.

    Parameters
    ----------
    folder : of the run; the model is that of its last checkpoint.
    file : other rows (.csv, .jsonl, .parquet); None: the run's test rows.

    Raises
    ------
    InputError : the folder is not a run, or the file does not fit.
    """
    store = RunStore(folder)
    head = store.read_head()
    experiment = read_experiment(head["config"], str(head.get("method")))
    progress = checkpoint.load(store.checkpoint, digest(head["config"]))
    bench = build(experiment, workshop)
    rows = bench.tokens.test if file is None else _other_rows(bench, file)
    scores = score(bench.federated, progress.model, rows, batch_size=experiment.evaluation.batch_size)
    return {
        "schema": 1,
        "run_dir": str(folder),
        "method": experiment.label,
        "seed": experiment.seed,
        "round": progress.round,
        "data": experiment.data.name if file is None else file,
        "rows": len(rows),
        **scores.metrics(),
        "clients": _spread(bench, rows, scores),
        "personal": _personal(bench, progress, rows, scores),
    }


def _other_rows(bench: Bench, file: str) -> Examples:
    data, model = bench.experiment.data, bench.experiment.model
    names, content = () if model.task == "causal-lm" else bench.tokens.train.label_names, CONTENT[model.task]
    column, label = getattr(data, content.option), data.label_column
    table = read_labelled_file(
        file, column=column, label_column=label, label_names=names, field="--data", content=content
    )
    return reader_of(data, model.name, model.task).read(table, names)


def _spread(bench: Bench, rows: Examples, scores: Scores) -> Plain | None:
    """Return mean and worst tenth over clients; None where the rows cannot be dealt out to that many clients."""
    parts = _dealt(bench, rows)
    return None if parts is None else dict(client_spread(client_metrics(scores, parts), bench.metric))


def _personal(bench: Bench, progress: Progress, rows: Examples, scores: Scores) -> Plain | None:
    """Return the means of own models and of the shared one on the same rows; None where nobody has a model of its own.

    Each client counts once.
    """
    parts, memories = _dealt(bench, rows), progress.pending.memory
    whole = AdapterSlice.everything(progress.model.adapter.shape)
    own: list[float] = []
    shared: list[float] = []
    for client, part in enumerate(parts or []):
        memory = memories.get(client, {})
        if not len(part) or not has_own(memory):
            continue
        model = replace(progress.model, adapter=with_own(progress.model.adapter, whole, memory))
        size = bench.experiment.evaluation.batch_size
        own.append(score(bench.federated, model, rows.select(part), batch_size=size).metrics()[bench.metric])
        shared.append(scores.metrics(part)[bench.metric])
    return {"clients": len(own), "own": fmean(own), "shared": fmean(shared)} if own else None


def _dealt(bench: Bench, rows: Examples) -> Sequence[Indices] | None:
    """Return the rows of each client by the run's partitioner; None where they cannot be dealt to that many."""
    experiment = bench.experiment
    try:
        return experiment.partition(rows.labels, experiment.fleet.clients, seed=experiment.seed)
    except InputError:
        return None
