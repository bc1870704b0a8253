"""Codecs whose share of what is sent can be set from outside, by a planner that decides it every round."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from airtune.types import Compressor


def is_adjustable(compressor: Compressor) -> bool:
    """Return whether the codec, or the one it wraps, has a field ``keep_ratio``."""
    return _has(compressor, "keep_ratio") or _has(getattr(compressor, "inner", None), "keep_ratio")


def with_keep_ratio(compressor: Compressor, keep_ratio: float) -> Compressor:
    """Return the codec with another keep ratio. Raises TypeError if it has none."""
    if _has(compressor, "keep_ratio"):
        return cast("Compressor", replace(cast("Any", compressor), keep_ratio=keep_ratio))
    if is_adjustable(compressor):
        inner = with_keep_ratio(cast("Any", compressor).inner, keep_ratio)
        return cast("Compressor", replace(cast("Any", compressor), inner=inner))
    raise TypeError(f"{type(compressor).__name__} has no keep ratio")


def _has(value: object, name: str) -> bool:
    return is_dataclass(value) and any(entry.name == name and entry.init for entry in fields(value))
