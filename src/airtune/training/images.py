"""Labelled images: read once through the model's image processor, and held as the pixels that its network takes.

A row of image data has the column ``pixels``: height x width (grey) or height x width x channels numbers. What these
numbers mean (0 to 255, 0 to 16, ...) the processor says, in the model's ``preprocessor_config.json``: it resizes,
rescales and normalises. Pixels are held in fp32: 224 x 224 x 3 take 0.6 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from airtune.devices.latency import TransformerShape
from airtune.errors import InputError
from airtune.training.catalogue import read_config, resolve_model
from airtune.training.families import family_of

if TYPE_CHECKING:
    from datasets import Dataset

PROCESSOR_FILE = "preprocessor_config.json"
_CHUNK = 256  # rows that the processor gets at once


@dataclass(frozen=True)
class ImageData:
    """Images as the network takes them, all of one size.

    Attributes
    ----------
    pixels : [images, channels, height, width], float32; resized and normalised.
    labels : [images], int64; the class of each image.
    num_labels : number of classes. label_names : their names.
    places : token places of an image in the network: its patches and the class token.
    """

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]
    num_labels: int
    label_names: tuple[str, ...]
    places: int
    task: Literal["image-classification"] = "image-classification"

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the token places of each image, [images], all equal."""
        return np.full(len(self), self.places, dtype=np.int64)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Return pixels and labels."""
        return {"pixels": self.pixels, "labels": self.labels}

    @property
    def fields(self) -> Mapping[str, Any]:
        """Return all that is no array."""
        return {"num_labels": self.num_labels, "label_names": self.label_names, "places": self.places}

    def batch(self, indices: NDArray[np.integer[Any]] | Sequence[int]) -> Mapping[str, NDArray[Any]]:
        """Return ``pixel_values`` [batch, channels, height, width] and ``labels`` [batch]."""
        chosen = np.asarray(indices, dtype=np.int64)
        return {"pixel_values": self.pixels[chosen], "labels": self.labels[chosen]}

    def select(self, indices: NDArray[np.integer[Any]] | Sequence[int]) -> ImageData:
        """Return the given images as data of their own (a copy), in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class ImageReader:
    """Turns rows with the column ``pixels`` into `ImageData`; an `airtune.training.readers.Reader`.

    Attributes
    ----------
    model : whose image processor it is (see `resolve_model`).
    """

    model: str

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self.model)

    @cached_property
    def _shape(self) -> ImageShape:
        return ImageShape.of(read_config(self.model))

    @property
    def versions(self) -> Mapping[str, str]:
        """Return those of transformers and of what resizes."""
        return {name: version(name) for name in ("transformers", "pillow")}

    def read(self, rows: Dataset, label_names: Sequence[str] = ()) -> ImageData:
        """Return rows as pixels.

        Raises
        ------
        InputError : an image has other channels, or after the processor another size, than the network takes.
        """
        shape = self._shape
        parts: list[NDArray[np.float32]] = []
        for start in range(0, len(rows), _CHUNK):
            images = cast("list[Any]", rows[start : start + _CHUNK]["pixels"])
            parts.append(self._pixels([shape.three_axes(image) for image in images]))
        empty = np.empty((0, shape.channels, shape.size, shape.size), np.float32)
        return ImageData(
            pixels=np.concatenate([empty, *parts]),
            labels=np.asarray(rows["label"][:], dtype=np.int64),
            num_labels=max(len(label_names), 1),
            label_names=tuple(label_names),
            places=shape.places,
        )

    def stored(self, arrays: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]) -> ImageData:
        """Return the images of these arrays and fields."""
        names = tuple(fields["label_names"])
        return ImageData(arrays["pixels"], arrays["labels"], fields["num_labels"], names, fields["places"])

    def save(self, folder: Path) -> None:
        """Write the image processor."""
        self._processor.save_pretrained(folder)

    def _pixels(self, images: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Return images [height, width, channels] through the processor, [images, channels, height, width]."""
        size = self._shape.size
        wrong = {image.shape[:2] for image in images} - {(size, size)}
        if wrong and not self._processor.do_resize:
            height, width = min(wrong)
            raise InputError(
                f"data.image_column: an image has {height} x {width} pixels, the model takes {size} x {size}; valid: "
                f"images of that size, or do_resize in the model's {PROCESSOR_FILE}"
            )
        options = {"return_tensors": "np", "input_data_format": "channels_last"}
        return self._processor(list(images), **options)["pixel_values"].astype(np.float32)


@dataclass(frozen=True)
class ImageShape:
    """What a vision transformer takes: `channels` x `size` x `size` pixels, which fill `places` token places."""

    channels: int
    size: int
    places: int

    @classmethod
    def of(cls, config_json: Mapping[str, Any]) -> ImageShape:
        """Return the shape of a config.json; InputError if the model reads no images."""
        if not family_of(config_json).images:
            kind = config_json.get("model_type")
            raise InputError(f"model.task: {kind!r} reads text, not images; valid: sequence-classification, or a vit")
        places = TransformerShape.from_config(config_json).positions
        return cls(int(config_json.get("num_channels", 3)), int(config_json.get("image_size", 224)), places)

    def three_axes(self, image: Any) -> NDArray[Any]:
        """Return an image as [height, width, channels]; a grey one is repeated where the network takes colours."""
        found = np.asarray(image)
        found = found[:, :, None] if found.ndim == 2 else found
        if found.shape[-1] == 1 < self.channels:
            found = np.repeat(found, self.channels, axis=2)
        if found.shape[-1] != self.channels:
            raise InputError(
                f"data.image_column: an image has {found.shape[-1]} channels; valid: {self.channels}, as the model "
                "takes, or grey"
            )
        bytes_fit = found.dtype.kind in "ui" and 0 <= found.min() and found.max() <= 255
        return found.astype(np.uint8 if bytes_fit else np.float32)


def load_processor(model: str) -> Any:
    """Return the image processor of a model (see `resolve_model`).

    Raises
    ------
    InputError : the model cannot be found, or has no image processor that transformers can read.
    """
    from transformers import AutoImageProcessor

    where = resolve_model(model)
    try:
        return AutoImageProcessor.from_pretrained(where)
    except Exception as error:  # transformers raises many kinds here: offline, unknown id, damaged files
        raise InputError(
            f"model.name: no image processor for {model!r}: {' '.join(str(error).split())[:200]}"
        ) from error
