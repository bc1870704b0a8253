"""Relative paths in an experiment: those of the file mean its folder, those of the command line the shell's.

They are made absolute once, when the experiment is read, so that run.json names the same files from every folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airtune.experiment.hints import Plain
from airtune.training.catalogue import looks_like_path, names

FILE_TYPES = (".csv", ".jsonl", ".parquet", ".toml", ".json")
FIELDS = ("model.name", "data.name", "data.test_file", "wireless.path", "method.constants")  # where a path may stand
VARIANT_FIELDS = ("constants",)  # of a variant itself: they are the method's


def absolute_paths(tables: Plain, base: Path) -> Plain:
    """Return the tables of an experiment file with paths that are relative to the folder `base` made absolute."""
    changed = copy.deepcopy(tables)
    variants = changed.get("variant")
    for part in (changed, *(variants.values() if isinstance(variants, dict) else ())):
        for field in FIELDS:
            section, _, key = field.partition(".")
            table = part.get(section) if isinstance(part, dict) else None
            if isinstance(table, dict) and key in table:
                table[key] = absolute_path(table[key], base)
    for variant in variants.values() if isinstance(variants, dict) else ():
        for key in VARIANT_FIELDS:
            if isinstance(variant, dict) and key in variant:
                variant[key] = absolute_path(variant[key], base)
    fleet = changed.get("fleet")
    if isinstance(fleet, dict) and "devices" in fleet:
        fleet["devices"] = _devices(fleet["devices"], base)
    return changed


def absolute_overrides(overrides: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return overrides (dotted name -> value) with relative paths made absolute."""
    return {name: absolute_path(value, base) if _may_be_path(name) else value for name, value in overrides.items()}


def _may_be_path(name: str) -> bool:
    section, _, field = name.partition(".")
    return name in FIELDS or (section == "variant" and field.rpartition(".")[2] in VARIANT_FIELDS)


def absolute_path(text: Any, base: Path) -> Any:
    """Return a path made absolute; a name of the catalogue, an id of the hub and what is no text stay as they are.

    Text is a path if it ends like a file that is read here, can be nothing else, or is there.
    """
    if not isinstance(text, str) or not text or text in names("model") or text in names("data"):
        return text
    path = Path(text).expanduser()
    if text.endswith(FILE_TYPES) or looks_like_path(text) or (base / path).exists():
        return str((base / path).resolve())
    return text


def _devices(devices: Any, base: Path) -> Any:
    """Return the devices with paths of profiles (they end in .toml) made absolute."""

    def profile(name: Any) -> Any:
        return absolute_path(name, base) if isinstance(name, str) and name.endswith(".toml") else name

    if isinstance(devices, dict):
        return {profile(name): count for name, count in devices.items()}
    return [profile(name) for name in devices] if isinstance(devices, list) else devices
