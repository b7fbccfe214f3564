"""Digests of the numbers of the localvit on the path; `same_numbers.py` starts this and compares.

    python benchmarks/digests.py PART CHECKOUT OUT.json

PART is a key of `PARTS`. Only public names of localvit are used, so that the code inside may change.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Numbers = dict[str, dict[str, str]]
"""Quantity -> name of a tensor or value -> digest of its bits."""

ARCHITECTURES = (
    "localvit_tiny_patch16_224",
    "localvit_swin_tiny_patch4_window7_224",
    "localvit_pvt_tiny",
    "localvit_tnt_tiny_patch16_224",
    "localvit_t2t_vit_7",
)
# The names that the three paths of a prefix token have had, in one order.
PREFIXES = (("bypass", "mlp", "passthrough"), ("skip", "pointwise", "identity"))
# Every 5th of their combinations is measured: 5 divides none of the counts, so all pairs of values occur.
GRID: dict[str, tuple[Any, ...]] = {
    "glu": ("none", "gate", "both"),
    "prefix": (0, 1, 2),
    "gate": ("none", "se", "eca", "eca_hard"),
    "norm": ("none", "batch", "layer", "group"),
    "position": ("mid", "first"),
    "norm_order": ("norm-act", "act-norm"),
    "inner_skip": (False, True),
    "depthwise": (True, False),
    "kernel_size": (1, 3, 5),
}
SINGLE: tuple[dict[str, Any], ...] = (
    {"kernel_size": 7},
    {"activation": "gelu"},
    {"activation": ("none", "silu")},
    {"activation": ("relu6", "gelu_tanh")},
    {"norm": ("batch", "none", "layer")},
    {"norm": "group", "norm_groups": 32},
    {"bias": True},
    {"bias": (True, False, True)},
    {"gate_width": 8},
    {"gate_reduction": "dim"},
    {"gate_reduction": 16.0},
    {"expansion": 2.5},
    {"prenorm": True, "drop_path": True, "layer_scale": True},
)
VIT_SIZE = (32, 40)
VIT: dict[str, Any] = {
    "img_size": VIT_SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "reg_tokens": 1,
    "num_classes": 7,
    "init_values": 0.1,
    "drop_path_rate": 0.2,
    "proj_drop_rate": 0.1,
}
# Architecture -> model and `model.args` for images of 32 x 32.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "DeiT": ("deit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2}),
    "PVT": ("pvt_tiny", {"img_size": 64, "embed_dims": [8, 16, 20, 32], "depths": [1, 1, 1, 1]}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1]}
        | {"num_heads": [2, 2]},
    ),
}
SMALL = ("augment.scale=[0.7,1.0]", "optim.lr=0.002", "workers=0", "device=cpu", "schedule.warmup_epochs=1")
QUESTION = """
question: Does locality help?
control: plain
arms:
  local: {model.locality: {}}
scales:
  tiny: {recipe: digits}
"""
STUDY: tuple[str, ...] = ("model.args.embed_dim=8", "model.args.num_heads=2", "epochs=2", "batch_size=8")
STUDY += ("schedule.warmup_epochs=1", "device=cpu")


def bits(tensor: Any) -> str:
    """Digest the data type, shape and bytes of a tensor (`None` has a digest of its own)."""
    if tensor is None:
        return "none"
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.isfinite().all():
        raise ValueError("a tensor holds NaN or infinity: its comparison would prove nothing")
    head = f"{tensor.dtype} {tuple(tensor.shape)} "
    return hashlib.sha256(head.encode() + tensor.numpy().tobytes()).hexdigest()


def text_bits(value: Any) -> str:
    """Digest a JSON value; floats are written with all their digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fill_zeros(model: Any) -> None:
    """Give parameters that start at zero a value, so that their layers take part in the result."""
    import torch

    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)


def model_numbers(model: Any, size: tuple[int, int], label: str, found: Numbers) -> None:
    """Add the digests of initial weights, inference, both modes with gradients, and the buffers after."""
    import torch
    from torch.nn import functional as F

    def add(quantity: str, tensors: dict[str, Any]) -> None:
        digests = {f"{label}: {name}": bits(tensor) for name, tensor in tensors.items()}
        found.setdefault(quantity, {}).update(digests)

    add("initial weights", model.state_dict())
    fill_zeros(model)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)).requires_grad_()
    with torch.no_grad():
        add("inference: logits", {"logits": model.eval()(images)})
    for mode in ("eval", "train"):
        model.train(mode == "train").zero_grad(set_to_none=True)
        images.grad = None
        torch.manual_seed(1)  # of drop-path and dropout
        logits = model(images)
        loss = F.cross_entropy(logits, torch.tensor([1, 3]))
        loss.backward()
        add(f"{mode} mode: logits and loss", {"logits": logits, "loss": loss})
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        add(f"{mode} mode: gradients", {"images": images.grad, **gradients})
    add("buffers after train mode", dict(model.named_buffers()))


def architectures() -> Numbers:
    """Measure the five architectures of the paper at full size."""
    import timm
    import torch

    found: Numbers = {}
    for name in ARCHITECTURES:
        torch.manual_seed(0)
        model_numbers(timm.create_model(name, drop_path_rate=0.1), (224, 224), name, found)
    return found


def designs() -> Iterator[tuple[str, Any]]:
    """Label and configuration of every measured design (`None` where localvit refuses it)."""
    from localvit import PRESETS, ConfigError, LocalityConfig, preset

    def accepted(**fields: Any) -> Any:
        try:
            return LocalityConfig(**fields)
        except ConfigError:
            return None

    prefixes = next(names for names in PREFIXES if accepted(prefix=names[0]))
    for name in PRESETS:
        yield name, preset(name)
    for size in (1, 3, 7):
        yield f"preserve {size}", accepted(init="preserve", kernel_size=size)
    for fields in SINGLE:
        yield str(fields), accepted(**fields)
    for values in itertools.islice(itertools.product(*GRID.values()), 0, None, 5):
        fields = dict(zip(GRID, values, strict=True))
        groups = {"norm_groups": 1} if fields["norm"] == "group" else {}
        yield str(fields), accepted(**{**fields, "prefix": prefixes[fields["prefix"]], **groups})


def designs_on_vit() -> Numbers:
    """Measure presets, `preserve` and a grid of designs on a small vision transformer."""
    import timm
    import torch

    import localvit

    found: Numbers = {"accepted designs": {}}
    for label, config in designs():
        found["accepted designs"][label] = str(config is not None)
        if config is not None:
            torch.manual_seed(0)
            model = timm.create_model("vit_tiny_patch16_224", **VIT)
            localvit.localize(model, config, seed=3, count_macs=False)
            model_numbers(model, VIT_SIZE, label, found)
    return found


def write_images(folder: Path, side: int, channels: int) -> None:
    """Write two classes, bright and dark, of 16 noisy images each."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, mean in (("bright", 150), ("dark", 106)):
        (folder / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.normal(mean, 40, (side, side, channels)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels.squeeze()).save(folder / name / f"{i}.png")


def either(name: str, *rooms: str) -> Any:
    """Return a name from the first of these rooms that the tree has; 0.4 moved some."""
    for room in rooms:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(room), name)
    raise ImportError(f"none of {rooms} has {name}")


def train_numbers(config: Any, folder: Path, interrupt: bool) -> dict[str, str]:
    """Train, if asked with an interruption inside the second epoch, and digest weights and metrics."""
    from safetensors.torch import load_file

    from localvit.training import Callback, train

    interrupted = either("TrainingInterrupted", "localvit.errors", "localvit.training")
    stop_on_signals = either("stop_on_signals", "localvit.runtime", "localvit.training")

    class Stop(Callback):
        def on_epoch(self, metrics: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # training stops after the next step

    if interrupt:
        try:
            with stop_on_signals():
                train(config, callbacks=[Stop()])
        except interrupted:
            pass
        else:
            raise RuntimeError("the training was not interrupted")
    result = train(config)
    found = {"test loss": text_bits(result.test.loss), "test top-1": text_bits(result.test.top1)}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        found[f"epoch {metrics['epoch']}"] = text_bits(untimed(metrics))
    for which in ("best", "last"):
        weights = load_file(folder / which / "model.safetensors")
        found |= {f"{which} {name}": bits(tensor) for name, tensor in weights.items()}
    return found


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Drop what is measured with a clock."""
    return {k: v for k, v in metrics.items() if k not in ("seconds", "images_per_second", "data_wait")}


def trainings() -> Numbers:
    """Train three small architectures with locality, straight and interrupted."""
    resolve = either("resolve", "localvit.config", "localvit.training")
    found: Numbers = {}
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        write_images(images, 32, 3)
        for label, (model, args) in TRAINED.items():
            for way in ("straight", "interrupted and resumed"):
                folder = Path(temporary) / f"{label} {way}"
                args = {**args, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}
                args |= {"depth": 2} if label == "DeiT" else {}
                settings = [*SMALL, f"model.name={model}", f"model.args={json.dumps(args)}", "epochs=3"]
                settings += ["model.locality={}", "batch_size=4", "augment.mixup=0.8", "ema_decay=0.9"]
                settings += [f"data.train={images}", f"output={folder}", "save_seconds=0"]
                numbers = train_numbers(resolve(None, settings), folder, way != "straight")
                found[f"training of {label}, {way}"] = numbers
    return found


class InProcess(concurrent.futures.Executor):
    """Stand-in for `ProcessPoolExecutor` that works in this process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the function and return its result as a finished future."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def study() -> Numbers:
    """Run a study of two arms by the command line and digest its records."""
    from localvit.cli import main

    found: Numbers = {}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        write_images(here / "images", 8, 1)
        (here / "question.yaml").write_text(QUESTION)
        words = [str(here / "question.yaml"), "--scale", "tiny", "--data", str(here / "images")]
        words += [word for setting in STUDY for word in ("--set", setting)]
        if main(["study", "run", *words, "--seeds", "2", "--output", str(here / "out")]) != 0:
            raise RuntimeError("the study failed")
        for line in (here / "out" / "results.jsonl").read_text().splitlines():
            row = json.loads(line)
            row["history"] = [untimed(epoch) for epoch in row["history"]]
            row["validation"], row["test"] = untimed(row["validation"]), untimed(row["test"])
            fields = ("history", "best_epoch", "validation", "test", "parameters", "macs")
            digests = {f"{row['arm']} seed {row['seed']} {name}": text_bits(row[name]) for name in fields}
            found.setdefault("records of a study", {}).update(digests)
    return found


PARTS = {"architectures": architectures, "designs": designs_on_vit, "training": trainings, "study": study}


def main(part: str, checkout: Path, out: Path) -> None:
    """Measure one part with the checkout on the path, and write its digests as JSON."""
    concurrent.futures.ProcessPoolExecutor = InProcess  # type: ignore[assignment,misc]  # before localvit

    import timm  # noqa: F401 (first: names reach timm when a door is used or timm is imported, not by a submodule)
    import torch

    import localvit
    import localvit.locality.layers as layers

    if not Path(localvit.__file__).resolve().is_relative_to(checkout.resolve()):
        raise RuntimeError(f"localvit comes from {localvit.__file__}, not from {checkout}")
    if hasattr(layers, "SMALL_POINTWISE"):  # small point-wise layers by F.linear round differently
        layers.SMALL_POINTWISE = 0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    out.write_text(json.dumps(PARTS[part]()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
