"""Benchmark of two models and of the fastest matrix product, timed alternately."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.bench.engines import FILES, FORMS, EngineName, check_engine, open_on
from localvit.bench.host import memory_growth
from localvit.bench.measure import (
    Quartiles,
    Work,
    interleaved,
    ratio,
    timer_for,
    using_threads,
    without_gradients,
)
from localvit.bench.peak import Matmul, fastest_matmul
from localvit.bench.result import Comparison, Setting, Side
from localvit.config import Precision
from localvit.cost import count_macs, count_parameters
from localvit.engines import ExportInfo
from localvit.errors import ConfigError, at_least
from localvit.imports import do_what_waits
from localvit.inference import FUSED, OpenModel, check_source, fused, open_model
from localvit.models import VARIANTS, check_forward
from localvit.runtime import DTYPES, autocast, pick_device

SHORTEST = 0.02
"""Seconds of a turn, in which shorter calls are repeated."""


# Threads beyond any machine; OpenMP ends the process if it cannot start them.
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Configuration of a benchmark.

    Attributes:
        model: A timm name (built with random weights), or another source that `open_model` takes.
        against: As `model`; `None`: the baseline of a model that localvit knows.
        engine, against_engine: Engine of each; `None`: `"fused"` if the model has a fused form and `fuse` is
            set, else `"eager"`.
        batch_size: Images in a batch.
        size: Height and width of the images; `None`: each model's own.
        threads: Threads of torch and of the engines; `None`: torch's current number.
        rounds: Number of rounds.
        train: A training step (forward, backward, AdamW) instead of inference. It is never fused.
        precision: Type of the forward pass, by autocast, as in training; `"fp16"` needs a GPU.
        device: `"auto"`, `"cpu"`, `"cuda"`...
        fuse: Prefer fused forms if no engine is named.
        args: Constructor arguments of both models.
    """

    model: str
    against: str | None = None
    engine: EngineName | None = None
    against_engine: EngineName | None = None
    batch_size: int = 8
    size: int | None = None
    threads: int | None = None
    rounds: int = 15
    train: bool = False
    precision: Precision = "fp32"
    device: str = "auto"
    fuse: bool = True
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("size", 1), ("threads", 1), ("rounds", 2)):
            if getattr(self, name) is not None:
                at_least(self, "", least, name)
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ConfigError(f"threads={self.threads} is not accepted; use 1 to {MOST_THREADS}")
        if self.against is None and self.model not in VARIANTS:
            check_source(self.model)
            raise ConfigError(f"against: no baseline of {self.model!r} is known; name one (--against NAME)")


def compare(config: BenchConfig, progress: Callable[[range], Iterable[int]] = iter) -> Comparison:
    """Time two models and the fastest matrix product alternately.

    Args:
        progress: Wrapper of the rounds, as in `measure.interleaved`.

    Raises:
        ConfigError: if a model cannot be opened or an engine cannot be used.
        ExportFailed, ParityError: if a model cannot be written for its engine.
    """
    device = pick_device(config.device)
    engines = {"model": config.engine, "against": config.against_engine}
    for engine in engines.values():
        check_engine(engine or "eager", device, train=config.train, precision=config.precision)
    with using_threads(config.threads):
        names = {"model": config.model, "against": config.against or VARIANTS[config.model].base}
        opened = {side: load(name, config) for side, name in names.items()}
        ready = {side: _prepare(each, engines[side], config, device) for side, each in opened.items()}
        peak = fastest_matmul(device, DTYPES[config.precision])
        memory = {side: _memory(work, known["engine"], device) for side, (work, known) in ready.items()}
        seconds = interleaved(
            {side: work for side, (work, _) in ready.items()} | {"peak": without_gradients(peak.work)},
            config.rounds,
            timer=timer_for(device),
            at_least=SHORTEST,
            progress=progress,
        )
        sides = {
            side: Side(
                model=names[side],
                **known,
                **figures(config, known["gmacs"], seconds[side], seconds["peak"], peak),
                peak_memory=memory[side],
            )
            for side, (_, known) in ready.items()
        }
        return Comparison(
            ratio=ratio(seconds["model"], seconds["against"]),
            task="training step" if config.train else "inference",
            batch_size=config.batch_size,
            rounds=config.rounds,
            **sides,
            peak_gflops=peak.flops / Quartiles.of(seconds["peak"]).median / 1e9,
            peak_matmul=peak.words,
            setting=Setting.here(device, config.precision),
        )


def figures(
    config: BenchConfig, gmacs: float, seconds: list[float], peak_seconds: list[float], peak: Matmul
) -> dict[str, Any]:
    """Compute the fields of `Side` that follow from the seconds of a batch."""
    flops = fraction_flops(gmacs, config.batch_size, train=config.train)
    taken = Quartiles.of(seconds)
    return {
        "seconds": taken,
        "images_per_second": config.batch_size / taken.median,
        "fraction_of_peak": fraction(flops, seconds, peak.flops, peak_seconds),
    }


def fraction_flops(gmacs: float, batch_size: int, *, train: bool = False) -> float:
    """Return the operations of a call: two for each multiply-accumulate, three passes for a training step."""
    return 2e9 * gmacs * batch_size * (3 if train else 1)


def fraction(flops: float, seconds: list[float], peak_flops: float, peak_seconds: list[float]) -> Quartiles:
    """Return operations per second as a fraction of those of the matrix product in the same round."""
    shares = [(flops / own) / (peak_flops / other) for own, other in zip(seconds, peak_seconds, strict=True)]
    return Quartiles.of(shares)


def load(name: str, config: BenchConfig) -> OpenModel:
    """Open a model for images of the configured size.

    Raises:
        ConfigError: if it cannot be opened, or does not accept such images.
    """
    do_what_waits()  # a caller may come here without a door
    args = dict(config.args)
    known = timm.is_model(name)
    cfg = timm.get_pretrained_cfg(name) if known else None
    if config.size is not None and (cfg is None or cfg.fixed_input_size):
        args["img_size"] = config.size  # models of any size lack this argument
    found = open_model(name, "cpu", args=args, random_weights=known)
    found.require_pytorch("bench")
    if config.size is not None:
        channels = found.preprocessing.input_size[0]
        sized = replace(found.preprocessing, input_size=(channels, config.size, config.size))
        found = replace(found, preprocessing=sized)
    check_forward(found.model, name, found.preprocessing.input_size)
    return found


def _prepare(
    opened: OpenModel, engine: EngineName | None, config: BenchConfig, device: torch.device
) -> tuple[Work, dict[str, Any]]:
    """Put a model on an engine, by default its fused form if it has one.

    Returns:
        Its work, and the fields of `Side` that are known before it is timed.
    """
    size, form = opened.preprocessing.input_size, ""
    macs, parameters = count_macs(opened.model.eval(), size), count_parameters(opened.model)
    images = torch.randn(config.batch_size, *size, device=device)
    if config.train:
        engine = engine or "eager"
        model: Any = opened.model.to(device)
        model = torch.compile(model) if engine == "compile" else model
        work = training_step(model, images, config.precision)
    else:
        if engine is None and config.fuse:
            opened = fused(replace(opened, model=opened.model.to(device)))
            engine, form = ("fused" if opened.form == FUSED else "eager"), opened.form
            compute: Callable[[Tensor], Tensor] = opened.model
        else:
            engine = engine or "eager"
            info = ExportInfo.of(
                opened.preprocessing, architecture=opened.source, num_classes=opened.num_classes
            )
            compute = open_on(engine, opened.model, info, device)
        work = without_gradients(lambda: _forward(compute, images, config.precision))
    known = {"engine": engine, "form": form or FORMS[engine], "input_size": size}
    return work, known | {"parameters": parameters, "gmacs": macs / 1e9}


def _forward(model: Callable[[Tensor], Tensor], images: Tensor, precision: Precision) -> Tensor:
    with autocast(precision, images.device):
        return model(images)


def training_step(model: nn.Module, images: Tensor, precision: Precision = "fp32") -> Work:
    """Return a training step: forward pass, cross-entropy, backward pass, AdamW.

    The learning rate is 0, so that all rounds compute the same.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(_forward(model, images, precision), labels).backward()
        optimizer.step()

    return step


def _memory(work: Work, engine: EngineName, device: torch.device) -> int | None:
    if engine in FILES:
        return None  # it keeps memory between calls, which hides that of a call
    work()  # compile, allocate persistent memory
    work()
    return memory_growth(work, device)
