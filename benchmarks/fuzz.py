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
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import yaml

SECONDS, GROWTH, ROOM, PAGE = 10, 500 << 20, 3 << 30, resource.getpagesize()
OUTCOMES = ("accepted", "refused", "traceback", "hang", "growth", "nonsense", "unexplained")
TRACEBACK = 99
TINY = yaml.safe_load("""
model: {name: vit_tiny_patch16_224, locality: {expansion: 2.0, gate: eca, kernel_size: 3}, blocks: all,
  args: {img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1}}
optim: {name: adamw, lr: 0.01, weight_decay: 0.05, args: {eps: 0.0001}}
schedule: {name: cosine, warmup_epochs: 0, min_lr: 0.001, warmup_lr: 0.001}
augment: {mixup: 0.2, cutmix: 0.0, mix_prob: 1.0, smoothing: 0.1, erase: 0.0, repeats: 1, hflip: 0.5, scale: [0.5, 1.0]}
data: {train: images, crop_pct: 0.9, fraction: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
engine: {grad_accum: 1, clip_grad: 1.0, precision: fp32}
ema_decay: 0.9
epochs: 2
batch_size: 8
seed: 0
device: cpu
save_seconds: 60.0
""")
QUESTION = yaml.safe_load("""
question: Does depth help?
base: {model.args.embed_dim: 16}
arms: {deep: {model.args.depth: 2, resources: {minutes: 10}}, long: {epochs: 3, optim.lr: 0.02}}
scales: {mine: {recipe: tiny.yaml, arms: {deep: {epochs: 3}}}}
metric: top1
match: none
budget: epochs
claim: {text: t, source: s, expected: {deep: better}, reported: {deep: 74.8}}
""")
# fmt: off
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 1, -0.0, 0.5, 1.5, 2, 7, 1e-320, 1e308, 2**31, 2**63, 2**64, -(2**70))
TEXTS = ("", " ", "nan", "1e999", "a\0b", "x" * 5000, "\udcff", "é\u2028", "[/red]", "../..", "/dev/zero", "%s{0}")
NESTED = ([], {}, [0] * 3000, {"a": {"b": [1, None]}}, [[[[1]]]], [None])
VALUES = (*NUMBERS, *NUMBERS, *TEXTS, *NESTED, None, True, False)
RAW = (
    "0x_", "2024-99-99", "&a[*a]", "!!python/name:os.system", "1_0", "0o17", "12:30:45", "'", ".nan", "NaN", "1e999",
    "-Infinity", "<<: 3", "? x", "*b", "|", "={}", "\0", "\t", "\ud800", "9" * 5000, "[" * 3000, "{a: " * 500, "- - -",
    "{b: &b [0,0,0,0,0,0,0,0,0], c: &c [*b,*b,*b,*b,*b,*b,*b,*b], d: &d [*c,*c,*c,*c,*c,*c], e: [*d,*d,*d,*d]}",
)
OVER = (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0")
NO_WEIGHTS = (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html>", b"PK\3\4", b"\x80\x02}q.")
LINKS = ("/dev/zero", "/dev/full", "/dev/tty", "/proc/self/mem", "x.png", "gone", ".")
SHARDS = ("t-{0..99999999999}.tar", "{a..b}.tar", "t-{1..0}.tar", "t-{0..3}.tar", "{{0..9}..9}.tar", "_info.json")
TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"S", b"z")
SHARES = ("prob", "hflip", "vflip", "erase", "smoothing", "fraction", "ema_decay")
SUFFIXES = ("png", "jpg", "gif", "webp", "tif", "bmp", "ico", "ppm", "jp2", "avif", "qoi", "pcx", "sgi", "tga")
FEW = {"workers", "jobs", "threads", "shard"}
# fmt: on
Rng = random.Random


class Accepted(BaseException):
    """The first epoch of training is over."""


def mutated(rng: Rng, tree: Any) -> Any:
    """Return a copy of nested mappings and lists with values replaced, removed, renamed and wrapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        pending = [tree]
        while pending:
            node = pending.pop()
            places += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
            pending += [
                each
                for each in (node.values() if isinstance(node, dict) else node)
                if isinstance(each, (dict, list))
            ]
        if not places:
            break
        (node, key), kind = rng.choice(places), rng.random()
        if key in FEW:
            node[key] = rng.choice((-1, 0, 1, math.nan, "x", None))
        elif kind < 0.75:
            node[key] = rng.choice(VALUES) if kind < 0.65 else f"@@{rng.randrange(len(RAW))}@@"
        elif kind < 0.82:
            del node[key]
        elif kind < 0.9 and isinstance(node, dict):
            node[rng.choice((str(key) + "x", "a.b", *TEXTS))] = node.pop(key)
        else:
            node[key] = rng.choice(([node[key]], {"a": node[key]}, rng.choice(places)[1], str(node[key])))
    return tree


def text_of(rng: Rng, tree: Any, form: str) -> bytes:
    """Return a mutated tree as YAML or JSON, with raw text in places, now and then damaged as text."""
    tree = mutated(rng, tree)
    text = yaml.dump(tree, sort_keys=False) if form == "yaml" else json.dumps(tree)
    text = re.sub(r"""["']?@@(\d+)@@["']?""", lambda found: RAW[int(found[1])], text)
    data, kind = text.encode("utf-8", "surrogatepass"), rng.random()
    if kind < 0.04:
        return rng.choice((b"\xef\xbb\xbf" + data, text.encode("utf-16", "surrogatepass"), b"", b"null"))
    return damaged(rng, data) if kind < 0.12 else data


def damaged(rng: Rng, data: bytes) -> bytes:
    """Return bytes with some of them cut, overwritten, repeated or inserted, mostly near the start."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = min(int(len(content) * rng.random() ** rng.choice((1, 4))), max(len(content) - 1, 0))
        kind, length = rng.randrange(6), rng.choice((1, 2, 4, 64, 600))
        if kind == 0 and content:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + 4] = rng.choice(OVER)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = rng.randbytes(length)
        elif kind == 4:
            content[place:place] = content[place // 2 : place // 2 + length]
        elif rng.random() < 0.3:
            del content[place:]
    return bytes(content)


# Readers: each writes its files into the present folder and returns a command line.


def configuration(rng: Rng, home: Path) -> list[str]:
    Path("images").symlink_to(home / "images")
    Path("r.yaml").write_bytes(text_of(rng, TINY, "yaml"))
    return ["train", "--recipe", "r.yaml", "--output", "out"]


def question(rng: Rng, home: Path) -> list[str]:
    Path("images").symlink_to(home / "images")
    Path("tiny.yaml").symlink_to(home / "tiny.yaml")
    Path("q.yaml").write_bytes(text_of(rng, QUESTION, "yaml"))
    return ["study", "show", "q.yaml", "--scale", "mine"]


def checkpoint(rng: Rng, home: Path) -> list[str]:
    shutil.copytree(home / "run" / "best", "best")
    path = Path("best/config.json")
    path.write_bytes(text_of(rng, json.loads(path.read_text()), "json"))
    return predicting(home, "best")


def safetensors(rng: Rng, home: Path) -> list[str]:
    shutil.copytree(home / "run" / "best", "best")
    path = Path("best/model.safetensors")
    data, kind = path.read_bytes(), rng.random()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if kind < 0.5:
        header = text_of(rng, json.loads(data[8:end]), "json")
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])
    else:
        path.write_bytes(rng.choice(NO_WEIGHTS) if kind < 0.6 else damaged(rng, data))
    return predicting(home, "best")


def image(rng: Rng, home: Path) -> list[str]:
    name, kind = rng.choice(sorted(os.listdir(home / "formats"))), rng.random()
    target = Path(f"x{rng.choice((Path(name).suffix, '.jpg', '.png'))}")
    if kind < 0.1:
        make_special(rng, target)
    else:
        target.write_bytes(
            bomb(rng, home) if kind < 0.2 else damaged(rng, (home / "formats" / name).read_bytes())
        )
    form = rng.choice(((), ("--output", "p.csv"), ("--format", "jsonl")))
    return predicting(home, str(home / "run"), rng.choice((str(target), ".")), *form)


def make_special(rng: Rng, target: Path) -> None:
    """Make a file that is not regular, or that says that it is endless."""
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(target)
    elif kind == 1:
        target.mkdir()
    elif kind == 2:
        target.symlink_to(rng.choice(LINKS))
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    elif kind == 4:
        target.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    else:
        os.truncate(os.open(target, os.O_CREAT | os.O_RDWR), 1 << 36)


def bomb(rng: Rng, home: Path) -> bytes:
    """Return a small file of a large image, or one that says so."""
    sizes = ((60000, 60000), (65535, 1), (1, 65535), (9400, 9400), (2**31 - 1, 2), (13000, 13000))
    (width, height), kind = rng.choice(sizes), rng.randrange(4)
    short = struct.pack("<HH", width & 65535, height & 65535)
    if kind == 0:
        return b"P6 %d %d 255\n" % (width, height) + bytes(100)
    if kind == 1:
        return b"GIF89a" + short + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + short + b"\0\2\2D\1\0;"
    if kind == 2:
        header = (154, 0, 54, 40, width, height, 1, 24, *[0] * 6)
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", *header) + bytes(100)
    return rng.choice(sorted((home / "bombs").iterdir())).read_bytes()


def archive(rng: Rng, home: Path) -> list[str]:
    evaluate = ["evaluate", "--checkpoint", str(home / "run"), "--data"]
    if rng.random() < 0.1:
        return [*evaluate, "wds/.", "--data-root", ".", "--split", rng.choice(SHARDS)]
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for file in sorted((home / "other").rglob("*.png"))[: rng.choice((0, 1, 24, 24))]:
            info = tar.gettarinfo(file, str(file.relative_to(home)))
            if rng.random() < 0.1:
                info.type = rng.choice(TYPES)
                info.linkname = rng.choice((info.name, "other/a/0.png", "../../etc/passwd", "", "\udcff"))
            odd = ("", "/", "../x.png", "/" + info.name, "a\n/b.png", "\udcff/x.png", "x" * 300 + "/x.png")
            info.name = rng.choice((*[info.name] * 60, *odd))
            with file.open("rb") as data:
                tar.addfile(info, data)
    Path("x.tar").write_bytes(damaged(rng, content.getvalue()) if rng.random() < 0.7 else content.getvalue())
    return rng.choice(([*evaluate, "x.tar"], [*training(home)[:3], "--data", "x.tar", "--output", "out"]))


def prediction(rng: Rng, home: Path) -> list[str]:
    for path in (home / "part").iterdir():
        data = path.read_bytes()
        lines = data.split(b"\n") if path.name.endswith(".jsonl") else [data]
        place = rng.randrange(len(lines))
        with suppress(ValueError):
            lines[place] = (
                text_of(rng, json.loads(lines[place]), "json") if rng.random() < 0.5 else lines[place]
            )
        data = b"\n".join(lines)
        Path(path.name).write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
    return predicting(home, str(home / "run"), str(home / "images"), "--output", "p.csv")


def run_folder(rng: Rng, home: Path) -> list[str]:
    what = rng.choice(("run", "stopped", "study"))
    shutil.copytree(home / what, what)
    files = sorted(path for path in Path(what).rglob("*") if path.is_file() and path.suffix != ".safetensors")
    texts = [path for path in files if path.suffix in (".yaml", ".json", ".jsonl")]
    path, kind = rng.choice(texts if rng.random() < 0.85 else files), rng.random()
    if kind < 0.05:
        path.unlink()
        make_special(rng, path)
    elif kind < 0.7 and path in texts:
        lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
        place = rng.randrange(len(lines))
        lines[place] = text_of(rng, yaml.safe_load(lines[place]), path.suffix[1:])
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    if what == "study":
        return [
            "study",
            *rng.choice((["report", what], ["export", what], ["compare", what, str(home / "study")])),
        ]
    again = [*training(home)[:-1], what]
    return again if what == "stopped" or rng.random() < 0.7 else predicting(home, what)


def exported(rng: Rng, home: Path) -> list[str]:
    import onnx

    if rng.random() < 0.25:
        Path("m.onnx").write_bytes(damaged(rng, (home / "m.onnx").read_bytes()))
        return predicting(home, "m.onnx")
    model = onnx.load(str(home / "m.onnx"))
    (entry,) = (each for each in model.metadata_props if each.key == "localvit")
    entry.value = text_of(rng, json.loads(entry.value), "json").decode("utf-8", "replace")
    onnx.save(model, "m.onnx")
    return predicting(home, "m.onnx")


def arguments(rng: Rng, home: Path) -> list[str]:
    evaluate = ["evaluate", "--checkpoint", str(home / "run"), "--data", str(home / "other")]
    plan = ["plan", *training(home)[1:5]]
    show, models = ["study", "show", "gate"], ["models", "localvit_tiny_patch16_224"]
    words = rng.choice((predicting(home, str(home / "run")), evaluate, training(home), plan, models, show))
    flags = [
        flag
        for flag in re.findall(r"--[a-z][a-z-]+", (home / f"{words[0]}.help").read_text())
        if flag[2:] not in FEW
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        value, kind = (
            str(rng.choice((*VALUES, *RAW, "x.json", "p.csv", str(home / "images"), "0/2", "cuda"))),
            rng.random(),
        )
        if kind < 0.35:
            words[rng.randrange(1, len(words))] = value
        elif kind < 0.8:
            words += [rng.choice(flags), value]
        else:
            words += [
                "--set",
                f"{rng.choice(('epochs', 'optim.lr', 'model.args.depth', 'data.mean', 'seed', ''))}={value}",
            ]
    return [os.fsdecode(word.replace("\0", "").encode("utf-8", "replace")) for word in words]


def predicting(home: Path, model: str, *words: str) -> list[str]:
    """Return the command that predicts an image with a model, or what `words` say."""
    return ["predict", "--checkpoint", model, *(words or (str(home / "images" / "a" / "0.png"),))]


def training(home: Path) -> list[str]:
    """Return a command that trains."""
    return ["train", "--recipe", str(home / "tiny.yaml"), "--data", str(home / "images"), "--output", "out"]


READERS: tuple[Callable[[Rng, Path], list[str]], ...] = (
    *(configuration, question, checkpoint, safetensors, image),
    *(archive, prediction, run_folder, exported, arguments),
)


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
            r"^nonsense: .*|(?:[=:, ])(?:nan|inf(?:inity)?)\b", re.sub(r"^\$ .*", "", text), re.M | re.I
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
    study = "study run q.yaml --scale mine --data images --seeds 2 --jobs 1 --output study"
    words = [[*training(home)[:-1], "run"], study.split(), "export run --data images --output m.onnx".split()]
    words += [predicting(home, "m.onnx"), "evaluate --checkpoint run --data other".split()]
    for each in words:
        assert main(each) == 0, each
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
