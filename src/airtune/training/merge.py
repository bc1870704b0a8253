"""The federation's model as ordinary weights: a folder that transformers opens without PEFT and without airtune."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airtune.errors import InputError
from airtune.training.inputs import set_pad_token
from airtune.training.loading import load_network, quiet
from airtune.training.readers import Reader
from airtune.training.shapes import ModelConfig


def merge_adapter(
    adapter: Path, config: ModelConfig, labels: Sequence[str], out: Path, *, reader: Reader | None = None
) -> None:
    """Merge a PEFT folder into its base model and write the whole model, single precision, into the folder `out`.

    The classes carry their names. `out` appears complete or not at all.

    Parameters
    ----------
    adapter : a folder of `airtune.training.export.export_adapter` of the kind "peft".
    config : names the base model and the task.
    labels : of the classes, in label order; empty for a causal language model.
    out : must not exist.
    reader : of the base model: its tokenizer or image processor is written beside the weights; None: weights alone.

    Raises
    ------
    InputError : the base model is not there, or `adapter` is no PEFT folder. OSError : `out` cannot be written.
    """
    import peft

    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter}: is no PEFT folder; valid: the adapter of a run whose export.kind is peft")
    network, _ = load_network(config, len(labels) or None)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened: Any = peft.PeftModel.from_pretrained(network, str(adapter))
        merged: Any = opened.merge_and_unload(safe_merge=True)
    if config.task != "image-classification":
        set_pad_token(merged.config)
    if labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {name: number for number, name in enumerate(labels)}
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with quiet():
            merged.save_pretrained(fresh)
            if reader is not None:
                reader.save(fresh)
        fresh.chmod(0o755)
        fresh.rename(out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
