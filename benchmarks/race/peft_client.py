"""What a careful user of PEFT writes for one client. Both peers train with it, and the judge measures with it.

torch, transformers, peft and numpy only: it runs in the peers' environments. Batches are given, padded to their longest
example; no dropout; AdamW with torch's defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional


class Rows:
    """Token numbers of all examples, and who trains on which of them when."""

    def __init__(self, folder: Path, name: str = "train") -> None:
        """Read what `race.work` wrote."""
        with np.load(folder / f"{name}.npz") as stored:
            self.ids, self.offsets, self.labels = stored["ids"], stored["offsets"], stored["labels"]
        self.pad = json.loads((folder / "work.json").read_text())["pad"]

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return examples, padded on the right to the longest; negative indices are left out."""
        indices = indices[indices >= 0]
        lengths = np.diff(self.offsets)[indices]
        columns = np.arange(int(lengths.max()))
        mask = columns[None, :] < lengths[:, None]
        places = np.where(mask, self.offsets[indices][:, None] + columns[None, :], 0)
        ids = np.where(mask, self.ids[places], self.pad).astype(np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": self.labels[indices]}
        return {key: torch.from_numpy(values) for key, values in arrays.items()}


class Work:
    """The work of the race, as stored in its folder."""

    def __init__(self, folder: str | Path) -> None:
        """Read everything but the model."""
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / "work.json").read_text())
        self.batches = np.load(self.folder / "batches.npy")  # [rounds, clients, steps, batch], -1: no example
        self.rows = Rows(self.folder)

    def client_batches(self, round_index: int, client: int) -> list[dict[str, torch.Tensor]]:
        """Return the batches of a client in a round (from 1)."""
        return [self.rows.batch(indices) for indices in self.batches[round_index - 1, client]]

    def build(self) -> Any:
        """Return the base model with PEFT's LoRA on it, as every client starts in round 1."""
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        base = AutoModelForSequenceClassification.from_pretrained(
            self.settings["model"], num_labels=self.settings["labels"], dtype=torch.float32
        )
        return PeftModel.from_pretrained(base, str(self.folder / "start"), is_trainable=True).eval()


def get_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter (factors and head) under PEFT's names."""
    from peft import get_peft_model_state_dict

    return {key: value.detach() for key, value in get_peft_model_state_dict(model).items()}


def set_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put an adapter into the model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state)


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of a batch."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return functional.cross_entropy(output.logits, batch["labels"])


def train(model: Any, batches: list[dict[str, torch.Tensor]], learning_rate: float) -> float:
    """Train in place, one step a batch, and return the mean loss."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=learning_rate, weight_decay=0.0)
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def save(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the final adapter for the judge."""
    from safetensors.torch import save_file

    values = {key: value.detach().cpu().float().contiguous().clone() for key, value in state.items()}
    save_file(values, folder / ".final")
    (folder / ".final").rename(folder / "final")
