"""How a batch enters the network: token numbers with their mask, or pixels.

`FederatedModel` and its stored prefix know rows only through `NetworkInputs`, so nothing else asks what a row holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from airtune.training.shapes import Task

Arguments = dict[str, Tensor]  # of the network's forward pass, by name


class NetworkInputs(Protocol):
    """Turns batches into arguments of the network, and batches into single rows."""

    def arguments(self, batch: Mapping[str, Tensor]) -> Arguments:
        """Return what the network takes, on its device; what else the batch holds (labels) is left out."""
        ...

    def rows(self, arguments: Arguments) -> Iterator[tuple[bytes, Arguments]]:
        """Yield each row of the batch by itself, without padding: bytes that name it, and the arguments."""
        ...

    def places(self, arguments: Arguments) -> int | None:
        """Return to how many token places the rows of the batch are padded, None if rows are never padded."""
        ...


@dataclass(frozen=True)
class TokenInputs:
    """Text: `input_ids` and `attention_mask`, [batch, tokens], integers; padding has mask 0, whatever its token.

    pad_token_id : the token that padding is given.
    """

    device: torch.device
    pad_token_id: int

    def arguments(self, batch: Mapping[str, Tensor]) -> Arguments:
        """Return token numbers and mask on the device."""
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        return {"input_ids": ids.masked_fill(mask == 0, self.pad_token_id), "attention_mask": mask}

    def rows(self, arguments: Arguments) -> Iterator[tuple[bytes, Arguments]]:
        """Yield each text alone, named by its token numbers."""
        for ids, mask in zip(arguments["input_ids"], arguments["attention_mask"].bool(), strict=True):
            row = ids[mask][None]
            yield row.cpu().numpy().tobytes(), {"input_ids": row, "attention_mask": torch.ones_like(row)}

    def places(self, arguments: Arguments) -> int | None:
        """Return the tokens of every row, padding included."""
        return arguments["input_ids"].shape[1]


@dataclass(frozen=True)
class PixelInputs:
    """Images: `pixel_values`, [batch, channels, height, width], floating point, all of one size.

    dtype : of the network's own numbers.
    """

    device: torch.device
    dtype: torch.dtype

    def arguments(self, batch: Mapping[str, Tensor]) -> Arguments:
        """Return the pixels on the device, in the network's precision."""
        return {"pixel_values": batch["pixel_values"].to(self.device, self.dtype)}

    def rows(self, arguments: Arguments) -> Iterator[tuple[bytes, Arguments]]:
        """Yield each image alone, named by the SHA-256 of its pixels: an image itself may be as large as its states."""
        for image in arguments["pixel_values"]:
            content = image.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
            yield hashlib.sha256(content).digest(), {"pixel_values": image[None]}

    def places(self, arguments: Arguments) -> int | None:
        """Return None: all images have equally many patches."""
        return None


def inputs_of(task: Task, config: Any, device: torch.device, dtype: torch.dtype) -> NetworkInputs:
    """Return how rows of a task enter the network.

    Parameters
    ----------
    config : of the transformers model. A text model without a padding token gets one (its end token): decoders that
        classify find the last token of a text by it.
    device, dtype : of the network.
    """
    if task == "image-classification":
        return PixelInputs(device, dtype)
    return TokenInputs(device, set_pad_token(config))


def set_pad_token(config: Any) -> int:
    """Return the padding token of a text model's configuration, which gets its end token if it has none."""
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else (0 if end is None else end)
    return int(config.pad_token_id)
