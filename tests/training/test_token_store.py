"""Token numbers on disk: equal to freshly made ones, mapped, and keyed by everything that they depend on."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.training import readers, token_store
from airtune.training.data import DataConfig, TokenizedData
from airtune.training.token_store import token_splits


class WordTokenizer:
    """Numbers by the length of words; counts how often it is asked."""

    pad_token_id = 0
    eos_token_id = 1
    asked = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        WordTokenizer.asked += 1
        limit = options.get("max_length") or 10**6
        return {"input_ids": [[2 + len(word) for word in text.split()][:limit] for text in texts]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(readers, "load_tokenizer", lambda model: WordTokenizer())
    rows = [f"{'long ' * (i % 5)}text number{i},{'yes' if i % 2 else 'no'}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    WordTokenizer.asked = 0
    return tmp_path


def splits(place: Path, **changes: Any) -> Any:
    config = DataConfig(name=str(place / "rows.csv"), validation_rows=4)
    return token_splits(replace(config, **changes), str(place / "model"), task="sequence-classification")


def test_the_second_time_nothing_is_tokenised_and_the_pages_are_mapped(place: Path) -> None:
    fresh = splits(place)
    asked = WordTokenizer.asked
    stored = splits(place)
    assert asked == 3 and WordTokenizer.asked == asked
    assert list(stored) == ["train", "test", "validation"]
    config, task = DataConfig(name=str(place / "rows.csv"), validation_rows=4), "sequence-classification"
    made = token_store._made(config, task, readers.reader_of(config, str(place / "model"), task))
    for name, part in stored.items():
        assert isinstance(part.ids, np.memmap) and not part.ids.flags.writeable
        for other in (fresh[name], made[name]):
            for array in ("ids", "offsets", "labels"):
                np.testing.assert_array_equal(part.arrays[array], other.arrays[array])
                assert part.arrays[array].dtype == other.arrays[array].dtype
            assert replace(part, ids=other.ids, offsets=other.offsets, labels=other.labels) == other
    batch, again = stored["train"].batch([3, 1]), made["train"].batch([3, 1])
    assert all(np.array_equal(batch[key], again[key]) for key in batch)


def test_whatever_the_numbers_depend_on_is_in_the_key(place: Path) -> None:
    splits(place)
    for change in (
        lambda: splits(place, max_length=3),
        lambda: splits(place, split_seed=1),
        lambda: (place / "model" / "tokenizer.json").write_text('{"other": 1}') and splits(place),
        lambda: (place / "rows.csv").write_text("text,label\n" + "a,no\nb,yes\n" * 20) and splits(place),
    ):
        asked = WordTokenizer.asked
        change()
        assert WordTokenizer.asked > asked
    assert len(list((place / "cache" / "tokens").iterdir())) == 5


def test_a_cache_that_cannot_be_written_is_said_and_the_run_goes_on(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "cache").mkdir()
    (place / "cache" / "tokens").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert isinstance(splits(place)["train"], TokenizedData)
    assert "not kept" in caplog.text


def test_damage_is_named(place: Path) -> None:
    splits(place)
    (folder,) = (place / "cache" / "tokens").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "train.ids.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match=f"{folder.name}.*damaged"):
        splits(place)
    assert meta["train"]["fields"]["task"] == "sequence-classification"


def test_nothing_half_made_is_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_store.np, "save", broken)
    splits(place)
    assert list((place / "cache" / "tokens").iterdir()) == []
