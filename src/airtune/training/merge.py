"""The federation's model as ordinary weights: a folder that transformers opens without PEFT and without airtune."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airtune.errors import InputError
from airtune.training.catalogue import resolve_model
from airtune.training.loading import load_network, quiet
from airtune.training.shapes import ModelConfig

_READERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "preprocessor_config.json",
)


def merge_adapter(adapter: Path, config: ModelConfig, labels: Sequence[str], out: Path) -> None:
    """Merge a PEFT folder into its base model and write the whole model, single precision, into the folder `out`.

    What reads the rows (tokenizer or image processor) is copied from the base model where that is a local folder. The
    classes carry their names. `out` appears complete or not at all.

    Parameters
    ----------
    adapter : a folder of `airtune.training.export.export_adapter` of the kind "peft".
    config : names the base model and the task.
    labels : of the classes, in label order; empty for a causal language model.
    out : must not exist.

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
    if labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {name: number for number, name in enumerate(labels)}
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with quiet():
            merged.save_pretrained(fresh)
        _copy_readers(resolve_model(config.name), fresh)
        fresh.chmod(0o755)
        fresh.rename(out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _copy_readers(base: Path | str, folder: Path) -> None:
    if isinstance(base, str):  # of the hub: transformers finds them there by the name in config.json
        return
    for pattern in _READERS:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
