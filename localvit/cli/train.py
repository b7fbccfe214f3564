"""`localvit train`: make a configuration from a recipe, settings and flags, and train with it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from localvit.cli.arguments import UsageError, data_section, given, one_line_errors

if TYPE_CHECKING:
    from localvit.config import TrainConfig

_TOP = ("output", "epochs", "batch_size", "seed", "workers", "device")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Flags of a configuration: a recipe, --set, which overrides it, and the others, which override both."""

    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """a recipe of localvit (digits, small_images, finetune, deit_imagenet, ...), or a YAML file such as the
    config.yaml of another run"""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """any name for timm.create_model"""
    data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """training images: digits, an image folder, a .tar, or a name for timm.data.create_dataset"""
    val_data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """test images; default: the data's own test split, or images held out from the data"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """(rare) folder of timm's named data sets"""
    allow_overlap: tyro.conf.FlagCreatePairsOff[bool] = False
    """(rare) accept images that are in two splits or two classes; every result says how many"""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder for the results: a new one, or that of the same run to resume it"""
    locality: Annotated[str | None, tyro.conf.arg(metavar="default|none|YAML")] = None
    """locality of the model: default, none, '{preset: mix_ffn}', or fields such as '{init: preserve}'"""
    blocks: Annotated[str | None, tyro.conf.arg(metavar="YAML")] = None
    """(rare) blocks to localize: all, lower-half, [0, 1], [[0, 4]], ..."""
    pretrained: tyro.conf.FlagCreatePairsOff[bool] = False
    """start from published weights"""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """passes over the training images"""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """images per step, over all processes"""
    lr: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """peak learning rate"""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """seed of split, initial weights, order and augmentation"""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """data workers"""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """auto, cpu, cuda, cuda:1, ..."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """any field of the configuration (see --print-config), e.g. optim.lr=1e-3 or model.args.depth=4"""


@dataclass(frozen=True, kw_only=True)
class Options(ConfigOptions):
    """Train a model, choose its best epoch on a validation split, and measure it on a test split.

    A recipe gives values, --set changes them, and the other flags override both. The same command resumes an
    interrupted run. On several GPUs or machines: torchrun --nproc-per-node N -m localvit train ...

    Example: localvit train --recipe digits --locality default --output runs/digits
    """

    allow_change: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FIELD")] = ()
    """(rare) resume although FIELD has changed: a field, a section, data, versions or world_size"""
    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    """(rare) write curves for TensorBoard into the output folder"""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """print the resolved configuration and the values that follow from it, and stop"""


def run(options: Options) -> int:
    """Train; return 0, also if a signal interrupted the run after it saved its state."""
    from localvit.runtime import stop_on_signals

    with one_line_errors(), stop_on_signals():
        config = configuration(options)  # before torch, whose import takes seconds
        if options.print_config:
            _print_config(config)
            return 0
        if config.data.train == "DATA":  # in recipes, it stands for --data
            raise UsageError(f"recipe {options.recipe!r} names no data; add --data SRC")
        if config.output is None:
            raise UsageError("--output is missing; add --output FOLDER")
        _train(config, options)
    return 0


def _print_config(config: TrainConfig) -> None:
    from localvit.planning import effective, open_run
    from localvit.structure import to_yaml

    figures = effective(open_run(config))  # before printing, because it may refuse the configuration
    print(to_yaml(config), end="")
    print("# effective", *figures, sep="\n#   ")


def _train(config: TrainConfig, options: Options) -> None:
    from rich.console import Console

    from localvit.errors import TrainingInterrupted
    from localvit.training import TensorBoard, train

    callbacks = [TensorBoard()] if options.tensorboard else []
    try:
        train(config, console=Console(), allow_change=options.allow_change, callbacks=callbacks)
    except TrainingInterrupted as end:
        if os.environ.get("RANK", "0") == "0":
            print(f"localvit: {end}", file=sys.stderr)


def configuration(options: ConfigOptions) -> TrainConfig:
    """Return the configuration from recipe, settings and flags.

    Raises:
        UsageError, ConfigError: if it is missing or invalid.
    """
    from localvit.config import resolve
    from localvit.structure import parse_yaml

    if options.recipe is None and options.data is None and not options.set:
        raise UsageError("the training data is missing; add --data SRC or --recipe NAME")
    settings, locality, blocks = list(options.set), None, None
    if options.locality is not None:
        # A flag replaces the recipe's locality and is not merged with it.
        settings.append("model.locality=null")
        words: dict[str, Any] = {"default": {}, "none": None}
        value = options.locality
        if value.isidentifier() and value not in words:
            raise UsageError(
                f"--locality {value} is not accepted; use default, none or YAML such as '{{preset: mix_ffn}}'"
            )
        locality = words[value] if value in words else parse_yaml(value, f"--locality {value!r}")
    if options.blocks is not None:
        blocks = parse_yaml(options.blocks, f"--blocks {options.blocks!r}")
    model = given(name=options.model, pretrained=options.pretrained or None, locality=locality, blocks=blocks)
    data = data_section(options)
    top = {name: getattr(options, name) for name in _TOP}
    # No empty section: it would be a value.
    sections = given(model=model or None, data=data or None, optim=given(lr=options.lr) or None, **top)
    return resolve(options.recipe, settings, sections)
