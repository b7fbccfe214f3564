"""`localvit plan`: estimated cost of a configuration."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from localvit.cli.arguments import UsageError, one_line_errors
from localvit.cli.train import ConfigOptions, configuration


@dataclass(frozen=True, kw_only=True)
class Options(ConfigOptions):
    """Estimate a training run: steps, hours, memory, data rate, file sizes.

    Every line is marked as measured, computed or assumed. Nothing is written.

    Example: localvit plan --recipe deit_imagenet --gpus 8 --images-per-second 900
    """

    gpus: Annotated[str, tyro.conf.arg(metavar="N|NODESxN")] = "1"
    """GPUs, or nodes x GPUs in each, such as 8x8"""
    images_per_second: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """training speed of one GPU, as `localvit train` shows it"""
    memory_gb: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """memory of one GPU, in units of 1e9 bytes"""
    images: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """number of training images, if the data is not on this machine"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """print JSON"""


def run(options: Options) -> int:
    """Print the plan."""
    with one_line_errors():
        nodes, gpus = _gpus(options.gpus)
        config = configuration(options)  # before torch, whose import takes seconds
        from localvit.planning import Machine, plan_run

        speed, memory = options.images_per_second, options.memory_gb
        machine = Machine(nodes=nodes, gpus=gpus, images_per_second=speed, memory_gb=memory)
        figures = plan_run(config, machine, options.images)
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))
    else:
        print(*figures, sep="\n")
    return 0


def _gpus(text: str) -> tuple[int, int]:
    """Return the number of nodes and of GPUs in each."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)", text)
    if found is None:
        raise UsageError(f"--gpus {text!r} is not accepted; use a number or NODESxGPUS, such as 8x8")
    return int(found[1] or 1), int(found[2])
