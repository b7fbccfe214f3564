"""Every family of the paper, with and without locality: a few epochs on small images, does it train?

Not a comparison: one seed, few epochs, learning rates not tuned. It shows that all ten models train, without
a loss that is not finite, through the same code.

    python benchmarks/five_pairs.py --data TRAIN --val-data VAL [--epochs 3] [--families DeiT ...]
"""

import argparse
import math

from localvit.config import TrainConfig, load_recipe, merge
from localvit.structure import build
from localvit.training.loop import train

# Made small, for images of 64 x 64: name -> (plain, with locality, arguments).
PAIRS = {
    "DeiT": (
        "deit_tiny_patch16_224",
        "localvit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4},
    ),
    "T2T-ViT": (
        "t2t_vit_7",
        "localvit_t2t_vit_7",
        {"embed_dim": 128, "depth": 4, "num_heads": 4, "token_dim": 32},
    ),
    "PVT": ("pvt_tiny", "localvit_pvt_tiny", {"embed_dims": [32, 64, 80, 128], "depths": [1, 1, 1, 1]}),
    "TNT": (
        "tnt_t_legacy_patch16_224",
        "localvit_tnt_tiny_patch16_224",
        {"embed_dim": 96, "inner_dim": 12, "depth": 4, "num_heads_outer": 3, "num_heads_inner": 3},
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        "localvit_swin_tiny_patch4_window7_224",
        {"embed_dim": 32, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--val-data", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=PAIRS, default=list(PAIRS))
    options = parser.parse_args()
    recipe = load_recipe("small_images_quick")
    del recipe["model"]
    print("| family | model | parameters | loss, first -> last epoch | test top-1, % |")
    print("|---|---|---:|---:|---:|")
    for family in options.families:
        plain, local, args = PAIRS[family]
        for name in (plain, local):
            config = {
                "model": {"name": name, "args": {**args, "img_size": 64}},
                "data": {"train": options.data, "test": options.val_data},
                "epochs": options.epochs,
                "schedule": {"warmup_epochs": 1},
                "workers": options.workers,
            }
            result = train(build(TrainConfig, merge(recipe, config)))
            losses = [epoch["train_loss"] for epoch in result.history]
            assert all(map(math.isfinite, losses)), losses
            print(
                f"| {family} | `{name}` | {result.parameters:,} | {losses[0]:.3f} -> {losses[-1]:.3f} "
                f"| {result.test.top1:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
