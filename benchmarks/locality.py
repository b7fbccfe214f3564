"""What locality costs in time: ratios of interleaved runs, medians with quartiles.

    make bench        # a few minutes; writes benchmarks/results/locality_<machine>_<date>.{md,json}

Every pair alternates within one process, so both sides meet the same machine. A ratio below 1 means that
the first is faster. Compare ratios, not seconds: those belong to the machine named in the file.
"""

import argparse
from pathlib import Path

import timm
import torch
from interleaving import Work, interleaved, write
from rich.progress import track
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

import localvit
from localvit import Grid, LocalityFeedForward
from localvit.studies.records import machine


def inference(name: str, batch: int) -> Work:
    model, images = timm.create_model(name).eval(), torch.randn(batch, 3, 224, 224)

    def work() -> object:
        with torch.inference_mode():
            return model(images)

    return work


def training_step(name: str, batch: int) -> Work:
    model, images = timm.create_model(name).train(), torch.randn(batch, 3, 224, 224)

    def work() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    return work


def feed_forwards(batch: int) -> dict[str, Work]:
    """One feed-forward of LocalViT-T on a 14 x 14 lattice: ours, timm's block on maps, the plain one."""
    tokens = torch.randn(batch, 196, 192)
    image = torch.randn(batch, 192, 14, 14)
    ours = LocalityFeedForward(192).eval()
    block = InvertedResidual(192, 192, exp_ratio=4, act_layer=nn.Hardswish).eval()
    plain = timm.layers.Mlp(192, 768).eval()

    def run(module: nn.Module, *inputs: object) -> Work:
        def work() -> object:
            with torch.inference_mode():
                return module(*inputs)

        return work

    return {
        "LocalityFeedForward": run(ours, tokens, Grid(14, 14)),
        "timm InvertedResidual, NCHW, no gate": run(block, image),
        "timm Mlp": run(plain, tokens),
    }


def measurements(quick: bool) -> list[dict[str, object]]:
    pairs: list[tuple[str, str, Work, Work]] = []
    ours, base = "localvit_tiny_patch16_224", "deit_tiny_patch16_224"
    for batch in (1, 8, 32):
        pairs.append((f"{ours}, inference B{batch}", base, inference(ours, batch), inference(base, batch)))
    pairs.append((f"{ours}, training step B8", base, training_step(ours, 8), training_step(base, 8)))
    parts = feed_forwards(16)
    first, *others = parts
    pairs += [(f"{first}, inference B16", other, parts[first], parts[other]) for other in others]
    rounds = 3 if quick else 15
    return [
        {"measured": a, "against": b, **interleaved(work, other, rounds)}
        for a, b, work, other in track(pairs, "measuring", transient=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measurements(args.quick)
    hardware = machine(args.threads)
    setting = f"{hardware}, PyTorch {torch.__version__}, timm {timm.__version__}"
    about = f"{setting}; localvit {localvit.__version__}; float32, eager."
    cells = [
        (str(row["measured"]), str(row["against"]), "{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**row))
        for row in rows
    ]
    header = ("measured", "against", "ratio [quartiles]")
    path = write(args.output, "locality", hardware, f"# Cost of locality\n\n{about}\n", header, cells, rows)
    print(f"written: {path}.md and .json")


if __name__ == "__main__":
    main()
