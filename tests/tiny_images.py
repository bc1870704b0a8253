"""A whole experiment on images that trains in a second: a random two-layer ViT, made-up images of 8 x 8 numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tiny_experiment import TOML


def write_image_experiment(folder: Path, *, rows: int = 160, do_resize: bool = False) -> Path:
    """Write model, data and experiment file into a folder and return the file; the class is the brighter half."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", do_resize=do_resize)
    write_images(folder / "rows.jsonl", rows)
    text = TOML.format(folder=folder, seed=0).replace("rows.csv", "rows.jsonl")
    path = folder / "tiny.toml"
    path.write_text(text.replace("rank = 4", 'task = "image-classification"\nrank = 4'))
    return path


def write_images(path: Path, rows: int) -> None:
    """Write images of numbers 0 to 16, with the label left or right."""
    rng = np.random.default_rng(0)
    lines: list[str] = []
    for index in range(rows):
        image = rng.integers(0, 9, (8, 8))
        image[:, (0, 1, 2, 3) if index % 2 else (4, 5, 6, 7)] += 7
        lines.append(json.dumps({"pixels": image.tolist(), "label": "left" if index % 2 else "right"}))
    path.write_text("\n".join(lines) + "\n")


def write_model(folder: Path, *, do_resize: bool = False) -> None:
    """Write a random ViT without a head, and its image processor."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(
        do_resize=do_resize, size=size, rescale_factor=1 / 16, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
