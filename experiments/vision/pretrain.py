"""Make the small vision transformer of this folder: train it centrally on the digits 0 to 4.

    airtune fetch digits-0-4
    python experiments/vision/pretrain.py --out experiments/vision/vit-digits

No pretrained vision transformer installs from the package index, so this one is made: 4 layers of width 64, patches of
2 x 2 pixels, trained on seven eighths of 901 images of 8 x 8 pixels, moved by up to one pixel at random. The federation
fine-tunes it on the digits 5 to 9, of which it has seen none: no image is used twice. The folder is an ordinary one of
transformers (config.json, model.safetensors, preprocessor_config.json); its classifier, for the digits 0 to 4, is left
out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from airtune.errors import InputError
from airtune.streams import stream, torch_seed
from airtune.training.data import DataConfig, load
from airtune.training.images import ImageData, ImageReader

DATA = "digits-0-4"
SIZE, GREYS = 8, 16  # pixels of a side; the largest number of a pixel
EPOCHS, BATCH, LEARNING_RATE = 20, 32, 2e-3


def settings() -> Any:
    """Return the model's configuration."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=SIZE,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=5,
    )


def write_processor(folder: Path) -> None:
    """Write preprocessor_config.json: pixels 0 to 16 become -1 to 1, nothing is resized."""
    from transformers import ViTImageProcessorPil

    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessorPil(
        do_resize=False, size=size, rescale_factor=1.0 / GREYS, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder)


def moved(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return images [batch, 1, height, width], each moved by -1, 0 or 1 pixel in both directions; -1 comes in."""
    padded = functional.pad(pixels, (1, 1, 1, 1), value=-1.0)
    starts = rng.integers(0, 3, (len(pixels), 2))
    pairs = zip(padded, starts, strict=True)
    return torch.stack([image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in pairs])


def train(network: Any, data: ImageData, rng: np.random.Generator) -> None:
    """Train all weights with AdamW; the learning rate falls linearly to zero."""
    steps = EPOCHS * -(-len(data) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    network.train()
    for _ in range(EPOCHS):
        order = rng.permutation(len(data))
        for start in range(0, len(order), BATCH):
            batch = data.batch(order[start : start + BATCH])
            logits = network(pixel_values=moved(torch.from_numpy(batch["pixel_values"]), rng)).logits
            optimizer.zero_grad()
            functional.cross_entropy(logits, torch.from_numpy(batch["labels"])).backward()
            optimizer.step()
            schedule.step()
    network.eval()


def accuracy(network: Any, data: ImageData) -> float:
    """Return the share of images whose class is right."""
    batch = data.batch(np.arange(len(data)))
    with torch.inference_mode():
        found = network(pixel_values=torch.from_numpy(batch["pixel_values"])).logits.argmax(dim=1).numpy()
    return float((found == batch["labels"]).mean())


def make(folder: Path, seed: int) -> dict[str, float | int]:
    """Train the model and write it into an existing folder; return what was measured."""
    from transformers import ViTForImageClassification

    write_processor(folder)
    config = settings()
    config.save_pretrained(folder)  # the reader takes the sizes from it
    rows = load(DataConfig(name=DATA), task="image-classification")
    reader = ImageReader(str(folder))
    fit, held = (reader.read(part, rows.label_names) for part in (rows.train, rows.test))
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(torch_seed(seed, "pretrain"))
        network: Any = ViTForImageClassification(config)
    train(network, fit, stream(seed, "pretrain.batches"))
    network.vit.save_pretrained(folder)
    parameters = sum(value.numel() for value in network.vit.parameters())
    return {"parameters": parameters, "images": len(fit), "held_out": len(held), "accuracy": accuracy(network, held)}


def main() -> int:
    """Read the arguments, and put the finished folder into its place."""
    parser = argparse.ArgumentParser(description="Train the small vision transformer of experiments/vision.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(1)
    began = time.process_time()
    try:
        if out.exists():
            raise InputError(f"--out: {out} exists; valid: a new folder")
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".making-", dir=out.absolute().parent))
        try:
            made = make(beside, arguments.seed)
            beside.chmod(0o755)
            os.rename(beside, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"folder": str(out), **made, "seconds_of_processor": round(time.process_time() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
