"""The federation's model as a PEFT folder, so that anyone can open it without airtune."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from airtune.lora import LoraFactors, stack
from airtune.training.dora import decomposed
from airtune.training.model import FederatedModel, as_factors
from airtune.training.saved import write_adapter
from airtune.training.shapes import gain_name, in_head, saved_modules
from airtune.types import ServerModel

_TASK = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "image-classification": None}  # PEFT's names


def export_kind(model: FederatedModel) -> str:
    """Return what `export_adapter` writes: "peft", or "airtune" for what PEFT does not know (bottlenecks, MoLE)."""
    return "airtune" if model.config.adapter in ("bottleneck", "mole") else "peft"


def export_adapter(model: FederatedModel, server: ServerModel, folder: Path) -> None:
    """Write the server's model as ``adapter_config.json`` and ``adapter_model.safetensors`` into `folder`.

    ``PeftModel.from_pretrained(base, folder)`` opens it. All that acts on one module, merged updates included, becomes
    one LoRA without loss: the factors are stacked, so ranks may differ and stand in ``rank_pattern``, and each scaling
    is kept by ``alpha_pattern``. With DoRA the gains become PEFT's magnitudes. Bottleneck adapters and
    MoLE, which PEFT does not know, are written as `airtune.training.saved` says. The folder appears complete or not at
    all; an older one is replaced.

    Raises
    ------
    OSError : the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if export_kind(model) == "peft":
            _write_peft(model, server, fresh)
        else:
            write_adapter(model, server, fresh)
        fresh.chmod(0o755)
        _replace(folder, fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _write_peft(model: FederatedModel, server: ServerModel, folder: Path) -> None:
    modules = module_factors(server)
    magnitudes: dict[str, Tensor] = {}
    if model.config.adapter == "dora":
        for module, factors in modules.items():
            gain = server.adapter.extras[gain_name(module)]
            modules[module], magnitudes[module] = peft_dora(model.base_weight(module), factors, gain)
    content = {
        key: tensor.detach().cpu().float().contiguous().clone() for key, tensor in _tensors(server, modules, magnitudes)
    }
    save_file(content, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(_peft_config(model, modules), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def module_factors(server: ServerModel) -> dict[str, LoraFactors]:
    """Return the one LoRA of each module that anything acts on: its slots and what was merged into the base.

    A module on which nothing acts is left out, unless it has gains; if that holds for all, the first has a LoRA of rank
    1 that is zero, because PEFT knows no adapter without any.
    """
    found: dict[str, LoraFactors] = {}
    adapter = server.adapter
    for module, slots in adapter.placement.items():
        parts = [adapter.factors[slot] for slot in slots]
        parts += [as_factors(server.base_update[module])] if module in server.base_update else []
        parts = [part for part in parts if part.rank > 0]
        if not parts and gain_name(module) in adapter.extras:
            parts = [_nothing(adapter.factors[slots[0]])]
        if parts:
            found[module] = parts[0] if len(parts) == 1 and parts[0].core is None else stack(parts)
    if not found:
        module, slots = next(iter(adapter.placement.items()))
        found[module] = _nothing(adapter.factors[slots[0]])
    return found


def _nothing(like: LoraFactors) -> LoraFactors:
    """Return factors of rank 1 whose product is zero."""
    rows, columns = like.A.new_ones((1, like.in_features)), like.B.new_zeros((like.out_features, 1))
    return LoraFactors(A=rows, B=columns, scaling=1.0)


def peft_dora(weight: Tensor, factors: LoraFactors, gain: Tensor) -> tuple[LoraFactors, Tensor]:
    """Return factors and magnitudes with which PEFT's DoRA computes ``diag(gain) W0 + delta W``.

    PEFT divides by the norms of the rows of ``W0 + s B A``, which must not be zero: a row that is zero altogether gets
    a negligible B.
    """
    inner, magnitude = decomposed(weight, factors, gain)
    empty = magnitude == 0
    if bool(empty.any()):
        columns = torch.where(empty[:, None], _NEGLIGIBLE, inner.B)
        inner, magnitude = decomposed(weight, replace(factors, B=columns * gain[:, None]), gain)
    return inner, magnitude


_NEGLIGIBLE = 1e-10


def _tensors(
    server: ServerModel, modules: Mapping[str, LoraFactors], magnitudes: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    prefix = "base_model.model."
    pairs = [(f"{prefix}{module}.lora_A.weight", factors.A) for module, factors in modules.items()]
    pairs += [(f"{prefix}{module}.lora_B.weight", factors.B) for module, factors in modules.items()]
    pairs += [(f"{prefix}{module}.lora_magnitude_vector", tensor) for module, tensor in magnitudes.items()]
    return pairs + [(prefix + name, tensor) for name, tensor in server.adapter.extras.items() if in_head(name)]


def _peft_config(model: FederatedModel, modules: Mapping[str, LoraFactors]) -> dict[str, Any]:
    ranks = {module: factors.rank for module, factors in modules.items()}
    alphas = {module: factors.scaling * factors.rank for module, factors in modules.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=model.config.alpha,  # type: ignore[arg-type]  # PEFT annotates an integer and takes any number
        rank_pattern=ranks,
        alpha_pattern=alphas,  # type: ignore[arg-type]
        target_modules=sorted(modules),
        fan_in_fan_out=model.transposed,
        modules_to_save=list(saved_modules(model.config_json, model.shape.extras)) or None,
        task_type=_TASK[model.config.task],  # type: ignore[arg-type]
        base_model_name_or_path=model.config.name,
        use_dora=model.config.adapter == "dora",
        inference_mode=True,
        bias="none",
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `folder`."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(old / "old")
    fresh.rename(folder)
    shutil.rmtree(old)
