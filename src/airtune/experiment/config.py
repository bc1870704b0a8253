"""An experiment: a TOML file and the command line's overrides, as objects.

The sections are the fields of dataclasses that the rest of airtune defines (the model's, the data's, the channel's, the
method's ...), so a new field there can be set here at once. `Experiment.plain` is the way back: plain data from which
`read_experiment` makes an equal experiment.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from airtune.errors import InputError, unknown_name
from airtune.experiment import kinds
from airtune.experiment.combinations import check_combination
from airtune.experiment.hints import Context, Plain, field_names
from airtune.experiment.paths import absolute_overrides, absolute_paths
from airtune.experiment.pilot_file import read_constants
from airtune.experiment.schema import check_keys, from_notation, read, read_dataclass, write_dataclass
from airtune.experiment.sections import (
    Engine,
    Evaluation,
    FleetConfig,
    StopLimits,
    Wireless,
    check_training,
    read_merged,
    read_wireless,
    write_wireless,
)
from airtune.experiment.toml import read_toml
from airtune.training.data import DataConfig
from airtune.training.partition import Partitioner
from airtune.training.shapes import ModelConfig
from airtune.types import LocalTraining, Method

SECTIONS = ("model", "data", "fleet", "wireless", "training", "compressor", "method", "stop", "evaluation")
KEYS = ("name", "seed", *SECTIONS, "variant")
VARIANT_SECTIONS = ("model", "training", "compressor")
DEFAULT_METHOD = "fedit"


@dataclass(frozen=True)
class Experiment:
    """One run, fully described.

    Attributes
    ----------
    name : of the experiment: the file's name unless the file says otherwise.
    label : the method or the variant that this run is of.
    seed : of everything that is drawn.
    model, data, partition, fleet, wireless : the task and the world.
    training, engine : local training, and how this machine computes it.
    method_name, method : the method. Its `training` and `compressor` default to the sections of these names.
    compressor : table of the section [compressor], or None.
    stop, evaluation : when the run ends, and how it is measured.
    """

    name: str
    label: str
    seed: int
    model: ModelConfig
    data: DataConfig
    partition: Partitioner
    fleet: FleetConfig
    wireless: Wireless
    training: LocalTraining
    engine: Engine
    method_name: str
    method: Method[Any]
    compressor: Plain | None = None
    stop: StopLimits = field(default_factory=StopLimits)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def plain(self) -> Plain:
        """Return the experiment as plain data, every default written out."""
        context = _context(self.training, self.compressor)
        sections: Plain = {
            "name": self.name,
            "seed": self.seed,
            "model": write_dataclass(self.model),
            "data": {**write_dataclass(self.data), "partition": _write_partition(self.partition)},
            "fleet": write_dataclass(self.fleet),
            "wireless": write_wireless(self.wireless),
            "training": {**write_dataclass(self.training), **write_dataclass(self.engine)},
            "method": {"name": self.method_name, **write_dataclass(self.method, context)},
            "stop": write_dataclass(self.stop),
            "evaluation": write_dataclass(self.evaluation),
        }
        if self.compressor is not None:
            sections["compressor"] = self.compressor
        return sections

    def with_stop(self, **limits: Any) -> Experiment:
        """Return the experiment with other limits."""
        return replace(self, stop=replace(self.stop, **limits))


# ---------------------------------------------------------------------------------------------------------------- file


@dataclass(frozen=True)
class ExperimentFile:
    """The plain data of a file with the command line's overrides applied, before a method is chosen.

    tables : of the file. overrides : dotted name -> text or value, applied after the choice of the method.
    """

    name: str
    tables: Plain
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def variants(self) -> Mapping[str, Plain]:
        """Return the tables [variant.NAME]."""
        variants = self.tables.get("variant", {})
        if not isinstance(variants, Mapping):
            raise InputError('variant: must be tables [variant.NAME] with method = "..."')
        return cast("Mapping[str, Plain]", variants)

    def default_method(self) -> str:
        """Return the method that the file names."""
        method = self.tables.get("method", DEFAULT_METHOD)
        if isinstance(method, str):
            return method
        if not isinstance(method, Mapping) or not isinstance(cast("Plain", method).get("name"), str):
            raise InputError(f'method: must have name = "..."; valid: {", ".join([*kinds.METHODS, *self.variants])}')
        return cast("Plain", method)["name"]

    def experiment(self, label: str | None = None, **changes: Any) -> Experiment:
        """Return the experiment of one method or variant.

        Parameters
        ----------
        label : a method or a variant; None: the file's own.
        changes : dotted names (with ``__`` for the dot) that override everything else, for example ``seed=3``.

        Raises
        ------
        InputError : an unknown name or key, a wrong value, a missing section; one line.
        """
        label = self.label(label)
        overrides = {**self.overrides, **{name.replace("__", "."): value for name, value in changes.items()}}
        variants = _changed_variants(self.variants, overrides)
        tables = _choose_method(self.tables, variants, label)
        for name, value in overrides.items():
            if not name.startswith("variant."):
                _set(tables, name.split("."), value)
        return _experiment(tables, label, self.name)

    def label(self, name: str | None = None) -> str:
        """Return what a run of a method or variant is called: a method in kebab-case, a variant as the file spells it.

        name : ``-`` and ``_`` are equal; None: the file's own method. Errors as in `experiment`.
        """
        _check_variants(self.variants)
        return kinds.find_method(self.default_method() if name is None else name, self.variants)

    def check_overrides(self, labels: Sequence[str]) -> None:
        """Raise InputError for an override of a variant that is none of the `labels`: it would have no effect."""
        for name in self.overrides:
            section, _, rest = name.partition(".")
            if section == "variant" and not any(_same(rest.partition(".")[0], label) for label in labels):
                found = _variant_name(self.variants, name)
                raise InputError(f"variant.{found}: is changed but does not run; valid: {', '.join(labels)}")


def read_file(path: Path, overrides: Mapping[str, Any] | None = None) -> ExperimentFile:
    """Return an experiment file with overrides (dotted name -> text); errors as in `ExperimentFile.experiment`."""
    tables = read_toml(path)
    check_keys(tables, KEYS, "")
    if "name" in tables:
        _check_name("name", tables["name"])
    tables = absolute_paths(tables, path.resolve().parent)
    given = {name: _inline_table(name, value) for name, value in (overrides or {}).items()}
    return ExperimentFile(tables.get("name", path.stem), tables, absolute_overrides(given, Path.cwd()))


def _inline_table(name: str, value: Any) -> Any:
    """Return the table that a text like ``{ type = "iid" }`` is in TOML, or in JSON; other values as they are."""
    if not isinstance(value, str) or not value.strip().startswith("{"):
        return value
    try:
        return from_notation(value.strip())
    except ValueError as error:
        raise InputError(f"{name}: {value!r} is no inline table ({error}); valid: {{ key = value, ... }}") from error


def read_experiment(plain: Plain, label: str | None = None) -> Experiment:
    """Return the experiment of plain data as `Experiment.plain` gives it.

    label : of the run; None: the method's name.
    """
    made = ExperimentFile(str(plain.get("name", "experiment")), plain)
    return _experiment(plain, label or made.default_method(), made.name)


def _choose_method(tables: Plain, variants: Mapping[str, Plain], label: str) -> Plain:
    """Return the tables with [method] that of `label`, and a variant's other sections merged in."""
    chosen = copy.deepcopy({key: value for key, value in tables.items() if key != "variant"})
    if label in variants:
        return _apply_variant(chosen, copy.deepcopy(variants[label]), label)
    given = chosen.get("method", {})
    if isinstance(given, Mapping) and _same(str(cast("Plain", given).get("name")), label):
        return chosen
    chosen["method"] = {"name": label}  # the fields of [method] belong to the method that the file names
    return chosen


def _apply_variant(tables: Plain, variant: Any, label: str) -> Plain:
    where = f"variant.{label}"
    if not isinstance(variant, Mapping) or not isinstance(cast("Plain", variant).get("method"), str):
        raise InputError(f'{where}: must be a table with method = "..."; valid methods: {", ".join(kinds.METHODS)}')
    entries = dict(cast("Plain", variant))
    name = kinds.find_method(entries.pop("method"), {})
    if label.replace("_", "-") in kinds.METHODS and not _same(label, name):
        raise InputError(f'{where}: {label} is a method, and not {name}; valid: another name, or method = "{label}"')
    for section in VARIANT_SECTIONS:
        if section in entries:
            tables[section] = _merged(tables.get(section, {}), entries.pop(section))
    for section in (*SECTIONS, "seed", "name"):
        if section in entries:
            valid = f"method, {', '.join(VARIANT_SECTIONS)} and the fields of {name}"
            raise InputError(f"{where}.{section}: variants are compared in one world; valid: {valid}")
    base = tables.get("method", {})
    same = isinstance(base, Mapping) and _same(str(cast("Plain", base).get("name")), name)
    tables["method"] = _merged(base, {**entries, "name": name}) if same else {**entries, "name": name}
    return tables


def _check_variants(variants: Mapping[str, Plain]) -> None:
    """Raise InputError for names of variants that cannot name a folder, or that the command line cannot tell apart."""
    for name in variants:
        _check_name(f"variant.{name}", name)
        if twin := [other for other in variants if other != name and _same(other, name)]:
            raise InputError(f"variant.{name}: is the same name as {twin[0]} on the command line; valid: another name")


def _check_name(where: str, name: Any) -> None:
    """Raise InputError unless a name can be that of a folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise InputError(f"{where}: {name!r} names no folder; valid: text of letters, digits, '.', '_' and '-'")


def _changed_variants(variants: Mapping[str, Plain], overrides: Mapping[str, Any]) -> Mapping[str, Plain]:
    """Return the variants with the overrides ``variant.NAME.FIELD``."""
    ours = {name: value for name, value in overrides.items() if name.startswith("variant.")}
    changed = copy.deepcopy(dict(variants)) if ours else variants
    for name, value in ours.items():
        found = _variant_name(variants, name)
        path = name.split(".")[2:]
        table: Any = changed[found]
        if not path or not isinstance(table, dict):
            raise InputError(f"variant.{found}: is a table; valid: --variant.{found}.FIELD VALUE")
        _set(cast("Plain", table), path, value, where=f"variant.{found}.")
    return changed


def _variant_name(variants: Mapping[str, Plain], override: str) -> str:
    """Return which variant ``variant.NAME.FIELD`` changes."""
    name = override.split(".")[1]
    found = _spelled(variants, name)
    if found not in variants:
        raise unknown_name("variant", name, variants)
    return found


def _merged(base: Any, over: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    merged = dict(cast("Plain", base))
    for key, value in cast("Plain", over).items():
        merged[key] = _merged(merged[key], value) if key in merged else value
    return merged


def _same(name: str, other: str) -> bool:
    return name.replace("_", "-") == other.replace("_", "-")


def _set(tables: Plain, path: Sequence[str], value: Any, where: str = "") -> None:
    """Set a dotted name; a name on its way that is short for a table (``partition = "iid"``) becomes that table."""
    if not where and (path[0] in ("name", "variant") or (path[0] == "seed" and len(path) > 1)):
        raise InputError(f"{'.'.join(path)}: unknown key; valid: seed, SECTION.FIELD and variant.NAME.FIELD")
    for depth, name in enumerate(path[:-1]):
        key = _spelled(tables, name)
        inner = tables.get(key, {})
        if isinstance(inner, str):
            inner = {"name" if depth == 0 and key == "method" else "type": inner}
        if not isinstance(inner, Mapping):
            raise InputError(f"{where}{'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a table")
        tables[key] = dict(cast("Plain", inner))
        tables = tables[key]
    tables[_spelled(tables, path[-1])] = value


def _spelled(tables: Mapping[str, Any], name: str) -> str:
    """Return a key as the file spells it: ``-`` and ``_`` are equal on the command line."""
    return next((key for key in tables if _same(key, name)), name)


# ------------------------------------------------------------------------------------------------------------ sections


def _experiment(tables: Plain, label: str, name: str) -> Experiment:
    check_keys(tables, KEYS, "")
    tables = _with_adapter_kind(tables)
    _check_place(tables)
    training, engine = read_merged((LocalTraining, Engine), tables.get("training", {}), "training")
    check_training(training)
    compressor = _compressor(tables.get("compressor"))
    seed = _seed(tables.get("seed", 0))
    method_name, method = _method(tables["method"], training, compressor, seed)
    data, partition = _data(tables.get("data", {}))
    model = read_dataclass(ModelConfig, tables.get("model", {}), "model")
    check_combination(model, method, method_name)
    return Experiment(
        name=name,
        label=label,
        seed=seed,
        model=model,
        data=data,
        partition=partition,
        fleet=read_dataclass(FleetConfig, tables.get("fleet", {}), "fleet"),
        wireless=read_wireless(tables.get("wireless", {})),
        training=training,
        engine=engine,
        method_name=method_name,
        method=method,
        compressor=compressor,
        stop=read_dataclass(StopLimits, tables.get("stop", {}), "stop"),
        evaluation=read_dataclass(Evaluation, tables.get("evaluation", {}), "evaluation"),
    )


def _with_adapter_kind(tables: Plain) -> Plain:
    """Return the tables with [training] adapter, the other place where a file may name it, moved to [model]."""
    training, model = tables.get("training", {}), tables.get("model", {})
    if not isinstance(training, Mapping) or not isinstance(model, Mapping) or "adapter" not in training:
        return tables
    if "adapter" in model and model["adapter"] != training["adapter"]:
        raise InputError(
            f"training.adapter: {training['adapter']!r}, but model.adapter is {model['adapter']!r}; valid: one"
        )
    others = {key: value for key, value in cast("Plain", training).items() if key != "adapter"}
    return {**tables, "training": others, "model": {**cast("Plain", model), "adapter": training["adapter"]}}


def _check_place(tables: Plain) -> None:
    """Raise InputError for a field that stands in [training] and belongs to [model], or the other way round."""
    sections = {"model": {*field_names(ModelConfig)}, "training": {*field_names(LocalTraining), *field_names(Engine)}}
    for section, other in (("model", "training"), ("training", "model")):
        table = tables.get(section, {})
        strangers = sections[other] - sections[section]
        for key in table if isinstance(table, Mapping) else ():
            if key in strangers:
                raise InputError(f"{section}.{key}: unknown key; valid: {other}.{key}, in [{other}]")


def _context(training: LocalTraining, compressor: Plain | None) -> Context:
    return Context(kinds.choices(), kinds.defaults(write_dataclass(training), compressor))


def _seed(value: Any) -> int:
    seed = cast("int", read(int, value, "seed"))
    if seed < 0:
        raise InputError(f"seed: {seed} is negative; valid: 0 or more")
    return seed


def _compressor(value: Any) -> Plain | None:
    if value is None:
        return None
    table = {"type": value} if isinstance(value, str) else value
    context = Context(kinds.choices())
    made = read(kinds.Compressor, table, "compressor", context)
    return {"type": cast("Plain", table)["type"], **write_dataclass(made, context)}


def _method(value: Any, training: LocalTraining, compressor: Plain | None, seed: int) -> tuple[str, Method[Any]]:
    table: Plain = {"name": value} if isinstance(value, str) else dict(cast("Plain", value))
    name = kinds.find_method(str(table.pop("name")), {})
    constants = table.get("constants")
    if isinstance(constants, str) and not constants.lstrip().startswith("{"):
        table["constants"] = read_constants(constants, seed)
    made = read_dataclass(kinds.METHODS[name], table, "method", _context(training, compressor))
    check_training(getattr(made, "training", training), "method.training")
    return name, made


def _data(value: Any) -> tuple[DataConfig, Partitioner]:
    table = dict(cast("Plain", value)) if isinstance(value, Mapping) else value
    partition = table.pop("partition", "iid") if isinstance(table, dict) else "iid"
    made = read(Partitioner, partition, "data.partition")
    try:
        return read_dataclass(DataConfig, table, "data"), made
    except InputError as error:
        if "unknown key" in str(error):
            raise InputError(f"{error}, partition") from error
        raise


def _write_partition(partition: Partitioner) -> Plain:
    from airtune.experiment.schema import write

    return cast("Plain", write(Partitioner, partition))
