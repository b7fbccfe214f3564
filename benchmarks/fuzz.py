"""Does any input end in a traceback, a hang, a blow-up of memory or accepted nonsense? Damaged inputs, and a table.

    python benchmarks/fuzz.py                          # 1,000 inputs of seed 0
    python benchmarks/fuzz.py --inputs 1000 --seed 3 --json found.json
    python benchmarks/fuzz.py --seed 3 --again 17      # what input 17 of seed 3 says

Every input is a command line and the files that it reads, damaged or invented. It runs in a process that is forked
from a warm one, so it costs milliseconds, with a limit of time and of memory. Right is exit code 0, or another
one and a line that begins with `localvit:`. Training counts as accepted after its first epoch. Images, archives and
other files of bytes are cut, overwritten and mixed; values in YAML and JSON are replaced by others. Inputs
never ask for more than four data workers or jobs, because the machine is shared.
"""

import argparse
import collections
import dataclasses
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
from pathlib import Path
from typing import Any

import yaml

SECONDS, GROWTH, ROOM = 10, 500 << 20, 3 << 30
TRACEBACK = 99
OUTCOMES = ("accepted", "refused", "traceback", "hang", "growth", "nonsense", "unexplained")
TINY = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
        "locality": {"expansion": 2.0, "gate": "eca", "kernel_size": 3},
        "blocks": "all",
    },
    "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.05, "args": {"eps": 1e-8}},
    "schedule": {"name": "cosine", "warmup_epochs": 0, "min_lr": 1e-5, "warmup_lr": 1e-6},
    "augment": {"mixup": 0.2, "cutmix": 0.0, "smoothing": 0.1, "erase": 0.0, "repeats": 1, "hflip": 0.5},
    "data": {
        "train": "images",
        "crop_pct": 0.9,
        "fraction": 1.0,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "engine": {"grad_accum": 1, "clip_grad": 1.0, "precision": "fp32"},
    **{"ema_decay": 0.9, "epochs": 1, "batch_size": 8, "seed": 0, "device": "cpu", "save_seconds": 60.0},
}
QUESTION = {
    "question": "Does depth help?",
    "base": {"model.args.embed_dim": 16},
    "arms": {
        "deep": {"model.args.depth": 2, "resources": {"minutes": 10}},
        "long": {"epochs": 2, "optim.lr": 0.01},
    },
    "scales": {"mine": {"recipe": "tiny.yaml", "arms": {"deep": {"epochs": 3}}}},
    **{"metric": "top1", "match": "none", "budget": "epochs"},
    "claim": {"text": "t", "source": "s", "expected": {"deep": "better"}, "reported": {"deep": 74.8}},
}
NUMBERS = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1,
    -0.0,
    0.5,
    1.5,
    2,
    7,
    1e-320,
    1e308,
    2**31,
    2**63,
    2**64,
    -(2**70),
)
TEXTS = (
    "",
    " ",
    "nan",
    "1e999",
    "a\0b",
    "x" * 5000,
    "\udcff",
    "é\u2028",
    "[/red]",
    "../..",
    "/dev/zero",
    "%s{0}",
    "none",
)
VALUES = (
    *NUMBERS,
    *NUMBERS,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [0] * 3000,
    {"a": {"b": [1, None]}},
    [[[[1]]]],
    [None],
)
RAW = (
    *("0x_", "2024-99-99", "9" * 5000, "[" * 3000, "{a: " * 500, "&a [*a]", "!!python/name:os.system", "1_0", "0o17"),
    *("12:30:45", "'", "\0", ".nan", "NaN", "-Infinity", "1e999", "<<: 3", "? x", "*b", "|", "\ud800", "- - -", "\t", "={}"),
    "{b: &b [0,0,0,0,0,0,0,0,0], c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], d: &d [*c,*c,*c,*c,*c,*c,*c], e: [*d,*d,*d,*d,*d]}",
)  # fmt: skip
Rng = random.Random
WORKERS = {"workers", "jobs", "threads", "shard"}


class Accepted(BaseException):
    """The first epoch of training is over."""


# ---- damage ----


def mutated(rng: Rng, tree: Any, times: int | None = None) -> Any:
    """Return a copy of nested mappings and lists with values replaced, removed, renamed and repeated."""
    tree = json.loads(json.dumps(tree))
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        pending = [tree]
        while pending:
            node = pending.pop()
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            places += [(node, key) for key, _ in items]
            pending += [value for _, value in items if isinstance(value, (dict, list))]
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.random()
        if key in WORKERS:
            node[key] = rng.choice((-1, 0, 1, math.nan, "x", None))
        elif kind < 0.65:
            node[key] = rng.choice(VALUES)
        elif kind < 0.75:
            node[key] = f"@@{rng.randrange(len(RAW))}@@"
        elif kind < 0.82:
            del node[key]
        elif kind < 0.9 and isinstance(node, dict):
            node[rng.choice((str(key) + "x", "", "a.b", *TEXTS))] = node.pop(key)
        else:
            node[key] = rng.choice(([node[key]], {"a": node[key]}, rng.choice(places)[1], str(node[key])))
    return tree


def text_of(rng: Rng, tree: Any, form: str) -> bytes:
    """Return a tree as YAML or JSON, with raw text in places, now and then damaged as text."""
    text = json.dumps(tree) if form == "json" else yaml.dump(tree, sort_keys=False)
    text = re.sub(r"""["']?@@(\d+)@@["']?""", lambda found: RAW[int(found[1])], text)
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.04:
        return rng.choice(
            (
                b"\xef\xbb\xbf" + data,
                text.encode("utf-16", "surrogatepass"),
                data.replace(b"\n", b"\r"),
                b"",
                b"null",
            )
        )
    return damaged(rng, data) if kind < 0.12 else data


def damaged(rng: Rng, data: bytes) -> bytes:
    """Return bytes with some of them cut, overwritten, repeated or inserted; mostly near the start."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = min(int(len(content) * rng.random() ** rng.choice((1, 4))), max(len(content) - 1, 0))
        kind, length = rng.randrange(6), rng.choice((1, 2, 4, 64, 600))
        if kind == 0 and content:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + 4] = rng.choice(
                (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0")
            )
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = rng.randbytes(length)
        elif kind == 4:
            content[place:place] = content[place // 2 : place // 2 + length]
        elif rng.random() < 0.3:
            del content[place:]
    return bytes(content)


# ---- readers: each writes its files into the present folder and returns a command line ----


def configuration(rng: Rng, home: Path) -> list[str]:
    """A recipe."""
    Path("images").symlink_to(home / "images")
    Path("r.yaml").write_bytes(text_of(rng, mutated(rng, TINY), "yaml"))
    return ["train", "--recipe", "r.yaml", "--output", "out"]


def question(rng: Rng, home: Path) -> list[str]:
    """A question of one's own."""
    for name in ("images", "tiny.yaml"):
        Path(name).symlink_to(home / name)
    Path("q.yaml").write_bytes(text_of(rng, mutated(rng, QUESTION), "yaml"))
    return ["study", "show", "q.yaml", "--scale", "mine"]


def checkpoint(rng: Rng, home: Path) -> list[str]:
    """Metadata of a checkpoint."""
    shutil.copytree(home / "run" / "best", "best")
    values = json.loads(Path("best/config.json").read_text())
    Path("best/config.json").write_bytes(text_of(rng, mutated(rng, values), "json"))
    return predicting("best")


def safetensors(rng: Rng, home: Path) -> list[str]:
    """Weights."""
    shutil.copytree(home / "run" / "best", "best")
    path = Path("best/model.safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.random()
    if kind < 0.5:
        header = text_of(rng, mutated(rng, json.loads(data[8 : 8 + length])), "json")
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    elif kind < 0.6:
        data = rng.choice(
            (
                b"",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                b"<!DOCTYPE html>",
                b"PK\3\4",
                b"\x80\x02}q.",
            )
        )
    else:
        data = damaged(rng, data)
    path.write_bytes(data)
    return predicting("best")


def image(rng: Rng, home: Path) -> list[str]:
    """An image, in any format, or what is none."""
    name = rng.choice(sorted(os.listdir(home / "formats")))
    target = Path(f"x{rng.choice((Path(name).suffix, '.jpg', '.png'))}")
    kind = rng.random()
    if kind < 0.1:
        special(rng, target)
    elif kind < 0.2:
        target.write_bytes(bomb(rng))
    else:
        target.write_bytes(damaged(rng, (home / "formats" / name).read_bytes()))
    where = rng.choice((str(target), "."))
    return predicting(
        str(home / "run"), where, *rng.choice(((), ("--output", "p.csv"), ("--format", "jsonl")))
    )


def special(rng: Rng, target: Path) -> None:
    """Make something that is no regular file."""
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(target)
    elif kind == 1:
        target.mkdir()
    elif kind == 2:
        target.symlink_to(
            rng.choice(("/dev/zero", "/dev/full", "/dev/tty", "/proc/self/mem", target.name, "gone", "."))
        )
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    elif kind == 4:
        target.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    else:
        os.truncate(os.open(target, os.O_CREAT | os.O_RDWR), 1 << 36)


def bomb(rng: Rng) -> bytes:
    """Return a small file that says that it is a large image."""
    width, height = rng.choice(
        ((60000, 60000), (65535, 1), (1, 65535), (9400, 9400), (2**31 - 1, 2), (13000, 13000))
    )
    kind = rng.randrange(4)
    if kind == 0:
        return b"P6 %d %d 255\n" % (width, height) + bytes(100)
    if kind == 1:
        return b"GIF89a" + struct.pack("<HHBBB", width & 65535, height & 65535, 128, 0, 0) + bytes(6) + b",\0\0\0\0" + struct.pack("<HHB", width & 65535, height & 65535, 0) + b"\2\2D\1\0;"  # fmt: skip
    if kind == 2:
        return (
            b"BM"
            + struct.pack("<IIIIiiHHIIiiII", 154, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(100)
        )
    content = io.BytesIO()
    from PIL import Image

    Image.new("1", (min(width, 13000), min(height, 13000))).save(content, rng.choice(("PNG", "TIFF")), **{})
    return content.getvalue()


def archive(rng: Rng, home: Path) -> list[str]:
    """A tar of images."""
    if rng.random() < 0.1:
        shards = rng.choice(
            (
                "t-{0..99999999999}.tar",
                "{a..b}.tar",
                "t-{1..0}.tar",
                "t-{0..3}.tar",
                "{{0..9}..9}.tar",
                "_info.json",
            )
        )
        return [
            "evaluate",
            "--checkpoint",
            str(home / "run"),
            "--data",
            "wds/.",
            "--data-root",
            ".",
            "--split",
            shards,
        ]
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for file in sorted((home / "images").rglob("*.png"))[: rng.choice((0, 1, 24, 24))]:
            info = tar.gettarinfo(
                file,
                rng.choice(("", "/", "../", "a/../")) * (rng.random() < 0.05) + str(file.relative_to(home)),
            )
            if rng.random() < 0.1:
                info.type = rng.choice(
                    (
                        tarfile.LNKTYPE,
                        tarfile.SYMTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.CHRTYPE,
                        tarfile.DIRTYPE,
                        b"S",
                        b"z",
                    )
                )
                info.linkname = rng.choice((info.name, "images/a/0.png", "../../etc/passwd", "", "\udcff"))
                info.size *= info.type == b"S"
            info.name = rng.choice(
                (info.name,) * 20 + ("", "a\n/b.png", "\udcff/x.png", "x" * 300 + "/x.png")
            )
            tar.addfile(info, file.open("rb"))
    data = content.getvalue()
    Path("x.tar").write_bytes(damaged(rng, data) if rng.random() < 0.7 else data)
    if rng.random() < 0.5:
        return ["evaluate", "--checkpoint", str(home / "run"), "--data", "x.tar"]
    return ["train", "--recipe", str(home / "tiny.yaml"), "--data", "x.tar", "--output", "out"]


def prediction(rng: Rng, home: Path) -> list[str]:
    """What an interrupted prediction left."""
    for name in ("p.csv.part.json", "p.csv.part.jsonl"):
        if not (home / "part" / name).exists():  # another version has other names
            name = next(path.name for path in sorted((home / "part").iterdir()))
        data = (home / "part" / name).read_bytes()
        if rng.random() < 0.7:
            lines = data.split(b"\n") if name.endswith("l") else [data]
            place = rng.randrange(len(lines))
            try:
                lines[place] = text_of(rng, mutated(rng, json.loads(lines[place])), "json")
            except ValueError:
                lines[place] = damaged(rng, lines[place])
            data = b"\n".join(lines)
        Path(name).write_bytes(data if rng.random() < 0.8 else damaged(rng, data))
    return predicting(str(home / "run"), str(home / "images"), "--output", "p.csv")


def run_folder(rng: Rng, home: Path) -> list[str]:
    """The folder of a run or a study."""
    what = rng.choice(("run", "stopped", "study"))
    shutil.copytree(home / what, what)
    files = sorted(path for path in Path(what).rglob("*") if path.is_file() and path.suffix != ".safetensors")
    readable = [path for path in files if path.suffix in (".yaml", ".json", ".jsonl")]
    path = rng.choice(readable if rng.random() < 0.85 else files)
    data = path.read_bytes()
    if path in readable and rng.random() < 0.7:
        form = path.suffix[1:5]
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        place = rng.randrange(len(lines))
        lines[place] = text_of(rng, mutated(rng, yaml.safe_load(lines[place])), form)
        data = b"\n".join(lines)
    elif rng.random() < 0.1:
        path.unlink()
        special(rng, path)
    path.is_fifo() or not path.is_file() or path.stat().st_size > 1 << 30 or path.write_bytes(
        damaged(rng, data) if rng.random() < 0.3 else data
    )
    if what == "study":
        return [
            "study",
            *rng.choice(
                (
                    ["report", "study"],
                    ["export", "study", "--format", "csv"],
                    ["compare", "study", str(home / "study")],
                )
            ),
        ]
    again = ["train", "--recipe", str(home / "tiny.yaml"), "--data", str(home / "images"), "--output", what]
    return again if what == "stopped" or rng.random() < 0.7 else predicting(what)


def exported(rng: Rng, home: Path) -> list[str]:
    """An exported file, mostly its metadata."""
    if rng.random() < 0.25:
        Path("m.onnx").write_bytes(damaged(rng, (home / "m.onnx").read_bytes()))
        return predicting("m.onnx")
    import onnx

    model = onnx.load(str(home / "m.onnx"))
    (entry,) = [each for each in model.metadata_props if each.key == "localvit"]
    entry.value = text_of(rng, mutated(rng, json.loads(entry.value)), "json").decode("utf-8", "replace")
    onnx.save(model, "m.onnx")
    return predicting("m.onnx")


def arguments(rng: Rng, home: Path) -> list[str]:
    """Flags and their values."""
    starts = {
        "predict": predicting(str(home / "run")),
        "evaluate": ["evaluate", "--checkpoint", str(home / "run"), "--data", str(home / "images")],
        "train": [
            "train",
            "--recipe",
            str(home / "tiny.yaml"),
            "--data",
            str(home / "images"),
            "--output",
            "out",
        ],
        "plan": ["plan", "--recipe", str(home / "tiny.yaml"), "--data", str(home / "images")],
        "models": ["models", "localvit_tiny_patch16_224"],
        "study": ["study", "show", "gate", "--scale", "digits"],
        "export": ["export", str(home / "run"), "--output", "m.onnx"],
    }
    verb = rng.choice(sorted(starts))
    words = starts[verb]
    help_of = (home / "help" / verb).read_text()
    flags = [flag for flag in re.findall(r"--[a-z][a-z-]+", help_of) if flag[2:] not in WORKERS]
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = str(
            rng.choice((*VALUES, *RAW, "x.json", "out.csv", str(home / "images"), "0/2", "cpu", "cuda"))
        )
        kind = rng.random()
        if kind < 0.35:
            words[rng.randrange(1, len(words))] = value
        elif kind < 0.8:
            words += [rng.choice(flags), value]
        else:
            words += [
                "--set",
                f"{rng.choice(('epochs', 'optim.lr', 'model.args.depth', 'data.mean', 'model.name', 'augment', 'seed', ''))}={value}",
            ]
    return [word.replace("\0", "") for word in words]


def predicting(model: str, *words: str) -> list[str]:
    """Return the command that predicts an image of this fuzzer, or what `words` say."""
    return ["predict", "--checkpoint", model, *(words or (str(HOME / "images" / "a" / "0.png"),))]


READERS: dict[str, Callable[[Rng, Path], list[str]]] = {
    each.__name__: each
    for each in (configuration, question, checkpoint, safetensors, image, archive, prediction, run_folder, exported, arguments)
}  # fmt: skip
HOME = Path()


# ---- one input in one process ----


def nonsense(value: Any, path: str = "") -> list[str]:
    """Return the fields of a configuration that are NaN, infinite, or a probability that is none."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, each in items for found in nonsense(each, f"{path}.{key}")]
    if not isinstance(value, float):
        return []
    shares = ("mixup_prob", "hflip", "vflip", "erase", "smoothing", "fraction", "ema_decay")
    wrong = not math.isfinite(value) or (path.endswith(shares) and not 0 <= value <= 1)
    return [f"{path[1:]}={value}"] if wrong else []


def end_training_early() -> None:
    """Let training end after its first epoch, with a line about what it accepted."""
    training = importlib.import_module("localvit.training")
    train = training.train

    class Stop(training.Callback):  # type: ignore[name-defined, misc]
        def on_epoch(self, metrics: dict[str, Any]) -> None:
            raise Accepted

    def stopped(config: Any, **options: Any) -> None:
        try:
            train(config, **options | {"callbacks": [Stop()]})
        finally:
            if sys.exc_info()[0] in (None, Accepted) and (wrong := nonsense(config)):
                print("nonsense:", *wrong)

    training.train = stopped


def perform(make: Callable[[], list[str]], said: Path) -> None:
    """Run one input and end this process."""
    os.setsid()
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = TRACEBACK
    try:
        words = make()
        print("$ localvit", *(word[:200] for word in words), flush=True)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 20, 200 << 20))
        end_training_early()
        code = importlib.import_module("localvit.cli").main(words)
    except Accepted:
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/localvit/" in f.filename] or [
            None
        ]
        place = (
            frames[-1]
            and f"{frames[-1].filename.rpartition('/localvit/')[2]}:{frames[-1].lineno} {frames[-1].name}"
        )
        print(f"@@ {type(error).__name__} in {place}: {' '.join(str(error).split())[:150]}")
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code)


def attempt(make: Callable[[], list[str]], seconds: float = SECONDS) -> tuple[str, str, str]:
    """Fork, run one input in an empty folder, and return its outcome, a word on it, and what it said."""
    folder, before = (
        Path(tempfile.mkdtemp(prefix="fuzz-")),
        resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1]),
    )
    said, started = folder.with_suffix(".txt"), time.monotonic()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        perform(make, said)
    done, late = (0, 0, None), False
    while not done[0]:
        done = os.wait4(child, os.WNOHANG)
        if not done[0] and (late := time.monotonic() - started > seconds):
            os.killpg(child, signal.SIGKILL)
            done = os.wait4(child, 0)
        time.sleep(0.002)
    code, growth = os.waitstatus_to_exitcode(done[1]), done[2].ru_maxrss * 1024 - before
    text = said.read_text(errors="replace") if said.exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    said.unlink(missing_ok=True)
    detail = (re.findall(r"^@@ (.*)", text, re.M) or [f"exit code {code}"])[-1]
    if late:
        return "hang", f"{seconds} s", text
    if growth > GROWTH or "MemoryError" in detail or "can't allocate memory" in detail:
        return "growth", f"{growth >> 20} MB; {detail}", text
    if code == TRACEBACK or code < 0:
        return "traceback", detail, text
    if code == 0:
        wrong = re.findall(
            r"^nonsense: (.*)|((?:[=:, ]|^)(?:nan|inf(?:inity)?)\b)", re.sub(r"^\$ .*", "", text), re.M | re.I
        )
        return ("nonsense", str(wrong[0]), text) if wrong else ("accepted", detail, text)
    explained = re.search(r"^(localvit|usage):? ", text, re.M) or "no prediction" in text
    return ("refused" if explained else "unexplained"), detail, text


# ---- the whole ----


def prepare(home: Path) -> list[str]:
    """Make the files that are damaged later, by the package itself, and return the modules that it took."""
    from PIL import Image

    from localvit.cli import VERBS, main

    for name, colour in (("a", 40), ("b", 200)):
        (home / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (colour, 5 * i, 9)).save(home / "images" / name / f"{i}.png")
    (home / "formats").mkdir()
    for suffix in (
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
    ):
        picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 40).convert("RGB")
        try:
            picture.save(home / "formats" / f"x.{suffix}")
        except (KeyError, ValueError, OSError):
            pass  # this Pillow does not write it
    (home / "tiny.yaml").write_text(yaml.dump(TINY | {"epochs": 2}))
    (home / "q.yaml").write_text(
        yaml.dump(
            QUESTION
            | {
                "arms": {"deep": {"model.args.depth": 2}},
                "scales": {"mine": {"recipe": str(home / "tiny.yaml")}},
            }
        )
    )
    images, os.environ["PYTHONWARNINGS"] = str(home / "images"), "ignore"
    train = ["train", "--recipe", str(home / "tiny.yaml"), "--data", images, "--output"]
    assert main([*train, str(home / "run")]) == 0
    assert (
        main(
            [
                "study",
                "run",
                str(home / "q.yaml"),
                "--scale",
                "mine",
                "--data",
                images,
                "--seeds",
                "2",
                "--jobs",
                "1",
                "--output",
                str(home / "study"),
            ]
        )
        == 0
    )
    assert main(["export", str(home / "run"), "--data", images, "--output", str(home / "m.onnx")]) == 0
    assert main(["predict", "--checkpoint", str(home / "m.onnx"), images]) == 0
    assert main(["evaluate", "--checkpoint", str(home / "run"), "--data", images]) == 0
    end_training_early()
    try:
        main([*train, str(home / "stopped")])
    except Accepted:
        pass
    (home / "help").mkdir()
    for verb in VERBS:
        sys.stdout.flush()
        with open(home / "help" / verb, "w") as file:
            real, sys.stdout = sys.stdout, file
            main([verb, *(["show"] if verb == "study" else []), "--help"])
            sys.stdout = real
    interrupted(home)
    return sorted(sys.modules)


def interrupted(home: Path) -> None:
    """Leave what an interrupted prediction leaves, in whatever files this version has."""
    (home / "part").mkdir()
    try:
        module = importlib.import_module("localvit.inference")
    except ModuleNotFoundError:
        module = importlib.import_module("localvit.training.prediction_files")  # 0.3.1

    def stop(progress: Any, batch: Any) -> None:
        if progress.done >= 8:
            raise KeyboardInterrupt

    try:
        module.write_predictions(
            str(home / "run"), [str(home / "images")], str(home / "part" / "p.csv"), batch_size=4, watch=stop
        )
    except KeyboardInterrupt:
        pass


def table(counts: dict[str, collections.Counter[str]]) -> str:
    """Return the outcomes of each reader as a Markdown table."""
    rows = [[name, sum(row.values()), *(row[each] for each in OUTCOMES)] for name, row in counts.items()]
    rows.append(["**all**", *(sum(row[i] for row in rows) for i in range(1, len(OUTCOMES) + 2))])
    head = ["reader", "inputs", *OUTCOMES]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def main() -> int:
    """Fuzz; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", type=int, metavar="INPUT", help="run this one input and print what it says"
    )
    parser.add_argument("--reader", choices=READERS, action="append", help="only these; all unless given")
    parser.add_argument("--json", type=Path, help="write counts and findings here")
    options = parser.parse_args()
    global HOME
    HOME = Path(tempfile.mkdtemp(prefix="fuzz-home-"))
    names = options.reader or list(READERS)
    try:
        return fuzz(options, HOME, names)
    finally:
        shutil.rmtree(HOME, ignore_errors=True)


def fuzz(options: argparse.Namespace, home: Path, names: list[str]) -> int:
    """Prepare, run the inputs, print."""
    os.environ["OMP_NUM_THREADS"] = "1"
    child = os.fork()
    if child == 0:  # threads that it starts are not inherited
        with open(home / "log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                (home / "modules").write_text("\n".join(prepare(home)))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print((home / "log").read_text()[-3000:])
        return 2
    for name in (home / "modules").read_text().split():
        if not name.startswith(("__mp", "torch._inductor", "onnxruntime.capi.training")):
            try:
                importlib.import_module(name)
            except Exception:  # some cannot be imported by themselves
                pass
    importlib.import_module("torch").set_num_threads(1)
    counts = {name: collections.Counter[str]() for name in names}
    found, started = [], time.monotonic()
    for number in [options.again] if options.again is not None else range(options.inputs):
        name = names[number % len(names)]
        make = lambda: READERS[name](Rng(f"{options.seed} {number}"), home)  # noqa: B023, E731
        outcome, detail, text = attempt(make)
        counts[name][outcome] += 1
        if options.again is not None:
            print(text, outcome, detail)
        if outcome not in ("accepted", "refused"):
            said = text.replace(str(home), "HOME")
            found.append(
                {
                    "seed": options.seed,
                    "input": number,
                    "reader": name,
                    "outcome": outcome,
                    "detail": detail,
                    "said": said[:300] + said[-700:],
                }
            )
            print(f"{number} {name}: {outcome}: {detail}", flush=True)
    seconds = time.monotonic() - started
    print(f"\n{options.inputs} inputs, seed {options.seed}, {seconds:.0f} s\n\n{table(counts)}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"inputs": options.inputs, "seed": options.seed, "counts": counts, "found": found}, indent=1
            )
        )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
