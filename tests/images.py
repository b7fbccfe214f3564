"""A tiny model in an exported folder, and folders of odd-sized images."""

from pathlib import Path

import numpy as np
import timm
from PIL import Image
from timm.models import save_for_hf

from localvit.data.config import Preprocessing

HALF = (0.5,) * 3
PREPROCESSING = Preprocessing(
    input_size=(3, 16, 16), mean=HALF, std=HALF, interpolation="bicubic", crop_pct=0.9, crop_mode="center"
)
"""Preparation for a model that takes small images."""

SIZE = 16


def export_model(folder: Path, classes: int, names: list[str] | None = None, **data_config) -> str:
    """Save a model with random weights as `save_model` does; `data_config` overrides how it sees images."""
    args = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "global_pool": "avg",
    }
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **args)
    model.head.weight.data *= 20  # so that guesses differ
    seen = timm.data.resolve_model_data_config(model) | {"input_size": (3, SIZE, SIZE)} | data_config
    config = {"label_names": names} if names is not None else {}
    save_for_hf(model, str(folder), model_config=config, data_config=seen, safe_serialization=True)
    return str(folder)


def make_images(folder: Path, classes: dict[str, int], seed: int = 0) -> str:
    """Write FOLDER/class_name/N.png of random sizes and contents."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = (int(rng.integers(10, 60)), int(rng.integers(10, 60)), 3)
            values = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            image = Image.fromarray(values).resize(size[:2], Image.Resampling.BICUBIC)
            image.save(folder / name / f"{i}.png")
    return str(folder)
