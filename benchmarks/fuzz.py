"""Does any input end in a traceback, a hang, a blow-up of memory or accepted nonsense?

    python benchmarks/fuzz.py                                  # 1,000 inputs of seed 0
    python benchmarks/fuzz.py --inputs 1000 --seed 3 --json found.json
    python benchmarks/fuzz.py --seed 3 --again 17              # input 17 of seed 3, and what it says

An input is a command line and the files that it reads: values in YAML and JSON are replaced by others, bytes
are cut, overwritten and mixed. It runs in a process that is forked from a warm one, so it costs milliseconds,
with a limit of time and memory. Right is exit code 0, or another one and a line that begins with `localvit:`.
Training counts as accepted after its first epoch. No input asks for many workers or jobs, because the machine
is shared, nor for an export, which takes longer than the limit of time.
"""

import argparse
import collections
import dataclasses
import gc
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import yaml
from fuzz_inputs import QUESTION, READERS, TINY, Rng, predicting, training

SECONDS, GROWTH, ROOM, PAGE = 10, 500 << 20, 3 << 30, resource.getpagesize()
OUTCOMES = ("accepted", "refused", "traceback", "hang", "growth", "nonsense", "unexplained")
TRACEBACK = 99
SHARES = ("prob", "hflip", "vflip", "erase", "smoothing", "fraction", "ema_decay")
SUFFIXES = (
    "png",
    "jpg",
    "gif",
    "webp",
    "tif",
    "bmp",
    "ico",
    "ppm",
    "jp2",
    "avif",
    "qoi",
    "pcx",
    "sgi",
    "tga",
)


class Accepted(BaseException):
    """The first epoch of training is over."""


def nonsense(value: Any, path: str = "") -> list[str]:
    """Return the fields of a configuration that are NaN, infinite, or a probability that is none."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, each in items for found in nonsense(each, f"{path}.{key}")]
    wrong = isinstance(value, float) and not (
        math.isfinite(value) and (0 <= value <= 1 or not path.endswith(SHARES))
    )
    return [f"{path[1:]}={value}"] if wrong else []


def end_training_early() -> None:
    """Let training end after its first epoch, with a line about what it accepted."""
    room = importlib.import_module("localvit.training")
    train = room.train

    class Stop(room.Callback):  # type: ignore[name-defined, misc]
        def on_epoch(self, metrics: dict[str, Any]) -> None:
            raise Accepted

    def stopped(config: Any, **options: Any) -> None:
        try:
            train(config, **options | {"callbacks": [Stop()]})
        except Accepted:
            print("".join(f"nonsense: {found}\n" for found in nonsense(config)))
            raise

    room.train = stopped


def perform(make: Callable[[], list[str]], said: Path) -> int:
    """Run one input in this process, which says everything into a file, and return its exit code."""
    os.setsid()
    for descriptor, file, flags in ((0, os.devnull, 0), (1, said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(file, flags), descriptor)
    os.dup2(1, 2)
    try:
        words = make()
        print("$ localvit", *(word[:200] for word in words), flush=True)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 20, 200 << 20))
        end_training_early()
        return int(importlib.import_module("localvit.cli").main(words))
    except Accepted:
        return 0
    except BaseException as error:
        traceback.print_exc()
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/localvit/" in frame.filename
        ]
        place = [f"{each.filename.rpartition('/localvit/')[2]}:{each.lineno}" for each in frames[-1:]]
        print(f"@@ {type(error).__name__} in {place}: {' '.join(str(error).split())[:150]}")
        return TRACEBACK


def attempt(make: Callable[[], list[str]], seconds: float = SECONDS) -> tuple[str, str, str]:
    """Run one input in a fork and an empty folder; return its outcome, a word on it, and what it said."""
    folder, before = (
        Path(tempfile.mkdtemp(prefix="fuzz-")),
        int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
    )
    said, end = folder.with_suffix(".txt"), time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        code = perform(make, said)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
    done, late = os.wait4(child, os.WNOHANG), False
    while not done[0]:
        time.sleep(0.002)
        if late := time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        done = os.wait4(child, 0 if late else os.WNOHANG)
    code, growth = os.waitstatus_to_exitcode(done[1]), done[2].ru_maxrss * 1024 - before
    text = said.read_text(errors="replace") if said.exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    said.unlink(missing_ok=True)
    return (*judge(code, text, growth, late), text)


def judge(code: int, text: str, growth: int, late: bool) -> tuple[str, str]:
    """Return the outcome of an input, and a word on it."""
    detail = (re.findall(r"^@@ (.*)", text, re.M) or [f"exit code {code}"])[-1]
    if late:
        return "hang", detail
    if growth > GROWTH or "MemoryError" in detail or "can't allocate memory" in detail:
        return "growth", f"{growth >> 20} MB, {detail}"
    if code == TRACEBACK or code < 0:
        return "traceback", detail
    if code == 0:
        said = re.search(
            r"^nonsense: .*|(?:[=:, ])(?:nan|inf(?:inity)?)\b",
            re.sub(r"(?m)^(?:\$|warning:|base:| +[01]\.\d{3}) .*", "", text),
            re.M | re.I,
        )
        return ("nonsense", said[0]) if said else ("accepted", detail)
    return ("refused" if re.search(r"^localvit: |no prediction", text, re.M) else "unexplained"), detail


def prepare(home: Path) -> None:
    """Make the files that are damaged later, by the package itself, and list the modules that this took."""
    from PIL import Image

    from localvit.cli import VERBS, main

    for folder, label, shade in (
        ("images", "a", 40),
        ("images", "b", 200),
        ("other", "a", 50),
        ("other", "b", 190),
    ):
        (home / folder / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (shade, 5 * i, 9)).save(home / folder / label / f"{i}.png")
    (home / "formats").mkdir()
    for suffix in SUFFIXES:
        with suppress(KeyError, ValueError, OSError):  # this Pillow does not write it
            Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 40).convert("RGB").save(
                home / "formats" / f"x.{suffix}"
            )
    (home / "bombs").mkdir()
    for mode, side in (("1", 13000), ("L", 13000), ("RGB", 13000), ("RGBA", 9000)):
        Image.new(mode, (side, side)).save(home / "bombs" / f"{mode}.png", compress_level=1)
    (home / "tiny.yaml").write_text(yaml.dump(TINY))
    deeper = {
        "arms": {"deep": {"model.args.depth": 2}},
        "scales": {"mine": {"recipe": str(home / "tiny.yaml")}},
    }
    (home / "q.yaml").write_text(yaml.dump(QUESTION | deeper))
    os.chdir(home)
    for line in (
        "train --recipe tiny.yaml --data images --output run",
        "study run q.yaml --scale mine --data images --seeds 2 --jobs 1 --output study",
        "export run --data images --output m.onnx",
        "predict --checkpoint m.onnx images",
        "evaluate --checkpoint run --data other",
    ):
        assert main(line.split()) == 0, line
    end_training_early()
    with suppress(Accepted):
        main([*training(home)[:-1], "stopped"])
    for verb in VERBS:
        with (home / f"{verb}.help").open("w") as file, redirect_stdout(file):
            main([verb, *["show"] * (verb == "study"), "--help"])
    interrupt(home)
    (home / "modules").write_text("\n".join(sorted(sys.modules)))


def interrupt(home: Path) -> None:
    """Leave what an interrupted prediction leaves, in whatever files this version has."""
    (home / "part").mkdir()
    before = importlib.util.find_spec("localvit.inference") is None
    room: Any = importlib.import_module(
        "localvit.training.prediction_files" if before else "localvit.inference"
    )

    def stop(progress: Any, batch: Any) -> None:
        if progress.done >= 8:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        room.write_predictions("run", [str(home / "images")], "part/p.csv", batch_size=4, watch=stop)


def warm(home: Path) -> None:
    """Prepare in a process of its own, whose threads are not inherited, and import what it imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    child = os.fork()
    if child == 0:
        with (home / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                prepare(home)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit((home / "log").read_text()[-3000:])
    for name in (home / "modules").read_text().split():
        if not name.startswith(("__mp", "torch._inductor")):
            with suppress(Exception):  # some cannot be imported by themselves
                importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    with (home / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        importlib.import_module("localvit.cli").main(predicting(home, str(home / "run")))
    gc.freeze()


def main() -> int:
    """Fuzz; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", type=int, metavar="INPUT", help="run this one only, and print what it says"
    )
    parser.add_argument("--json", type=Path, help="write counts and findings here")
    options = parser.parse_args()
    home, names, found = (
        Path(tempfile.mkdtemp(prefix="fuzz-home-")),
        [reader.__name__ for reader in READERS],
        [],
    )
    counts = {name: collections.Counter[str]() for name in names}
    try:
        warm(home)
        started = time.monotonic()
        for number in range(options.inputs) if options.again is None else [options.again]:
            name, rng = names[number % len(names)], Rng(f"{options.seed} {number}")
            outcome, detail, text = attempt(
                lambda number=number, rng=rng: READERS[number % len(READERS)](rng, home)
            )
            counts[name][outcome] += 1
            if options.again is not None:
                print(text)
            if outcome not in ("accepted", "refused") or options.again is not None:
                said = text.replace(str(home), "HOME")
                entry = {"input": number, "reader": name, "outcome": outcome, "detail": detail}
                print(*entry.values(), flush=True)
                found.append(entry | {"said": said[:300] + said[-700:]})
    finally:
        shutil.rmtree(home, ignore_errors=True)
    rows = [[name, sum(row.values()), *(row[each] for each in OUTCOMES)] for name, row in counts.items()]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 2))])
    head = ["reader", "inputs", *OUTCOMES]
    print(f"\nseed {options.seed}, {time.monotonic() - started:.0f} s\n")
    print(*(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)), sep="\n")
    if options.json:
        options.json.write_text(
            json.dumps({"seed": options.seed, "counts": counts, "found": found}, indent=1)
        )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
