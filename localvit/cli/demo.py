"""`localvit demo`: a small study with and without locality, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from localvit.cli.arguments import (
    UsageError,
    check_extra,
    check_least,
    check_output,
    command_line,
    given,
    one_line_errors,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from localvit.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small DeiT with and without locality, and report the difference.

    Without options it uses scikit-learn's handwritten digits and takes a few minutes on two cores. Run the
    same command again to resume, or to write the report again.

    Example: localvit demo --data path/to/folder --seeds 3
    """

    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "digits"
    """training images: digits, an image folder, a .tar, or a name for timm.data.create_dataset"""
    val_data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """test images; default: the data's own test split, or images held out from the data"""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """recipe of both arms; default: digits for digits, otherwise small_images_quick (32x32 pixels)"""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """change a field of the recipe, e.g. epochs=5 or model.args.depth=4"""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """pairs of runs, at least 2"""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder for runs and report; default: demo for digits, otherwise demo/DATA"""
    jobs: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """runs at a time, one thread each"""
    tune: tyro.conf.FlagCreatePairsOff[bool] = False
    """(rare) instead of comparing, find each arm's learning rate on the validation split, in FOLDER/tuning"""
    tune_seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """(rare) seeds of --tune"""
    tune_factors: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X X ...")] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """(rare) learning rates of --tune as multiples of the recipe's; extended if the first or last is best"""


def run(options: Options) -> int:
    """Compare, or tune; return 0."""
    check_extra("demo")
    check_least(seeds=(options.seeds, 2), jobs=(options.jobs, 1), tune_seeds=(options.tune_seeds, 1))
    if not options.tune_factors or min(options.tune_factors) <= 0:
        raise UsageError(f"--tune-factors {options.tune_factors} is not accepted; use positive numbers")
    from pathlib import Path

    from rich.console import Console

    console = Console()
    with one_line_errors():
        check_output(options.output)
        folder = Path(options.output or _default_output(options.data))
        try:
            base = _base(options)  # before torch (see train)
            if options.tune:
                _tune(options, base, folder / "tuning", console)
            else:
                _compare(options, base, folder, console)
        except KeyboardInterrupt:
            print(f"stopped; finished runs are in {folder}, and the same command resumes")
            return 130
    return 0


def _base(options: Options) -> TrainConfig:
    from localvit.config import resolve

    return resolve(_recipe(options), options.set, {"data": given(train=options.data, test=options.val_data)})


def _recipe(options: Options) -> str:
    return options.recipe or ("digits" if options.data == "digits" else "small_images_quick")


def _default_output(data: str) -> str:
    """Return a folder of its own for each source."""
    import re

    if data == "digits":
        return "demo"
    return "demo/" + "-".join(re.findall(r"[\w-]+", data.removesuffix(".tar"))[-2:])


def _tune(options: Options, base: TrainConfig, folder: Path, console: Console) -> None:
    from localvit.studies import demo
    from localvit.studies.execution import save_tuning, tune
    from localvit.studies.reporting import tuning_table, tuning_text

    found = tune(
        base,
        demo.ARMS,
        folder,
        factors=options.tune_factors,
        seeds=options.tune_seeds,
        jobs=options.jobs,
        command=command_line(("demo",), options),
        console=console,
    )
    save_tuning(found, folder)
    console.print(tuning_table(found).rich("Learning rates"))
    console.print(tuning_text(found, base), markup=False, highlight=False, soft_wrap=True)
    print(f"written: {folder / 'tuning.json'}; the demo with the same data and output will use it")


def _compare(options: Options, base: TrainConfig, folder: Path, console: Console) -> None:
    from localvit.cli.study import print_report
    from localvit.studies import demo, run_study
    from localvit.studies.execution import load_tuning, shipped_tuning

    own = folder / "tuning" / "tuning.json"
    tuning = load_tuning(own) if own.exists() else shipped_tuning(_recipe(options))
    study = demo.demo_study(base, options.seeds, tuning)
    made = run_study(
        study,
        folder,
        tuning=tuning,
        command=command_line(("demo",), options),
        jobs=options.jobs,
        console=console,
    )
    print_report(made, console)
