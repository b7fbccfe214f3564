"""Damaged and invented inputs for `fuzz.py`: values, the damage, and what each reader is given."""

import copy
import io
import json
import math
import os
import random
import re
import shutil
import socket
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

TINY = yaml.safe_load("""
model: {name: vit_tiny_patch16_224, locality: {expansion: 2.0, gate: eca, kernel_size: 3}, blocks: all,
  args: {img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1}}
optim: {name: adamw, lr: 0.01, weight_decay: 0.05, args: {eps: 0.0001}}
schedule: {name: cosine, warmup_epochs: 0, min_lr: 0.001, warmup_lr: 0.001}
augment: {mixup: 0.2, cutmix: 0.0, mix_prob: 1.0, smoothing: 0.1, erase: 0.0, repeats: 1, hflip: 0.5,
  scale: [0.5, 1.0]}
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
NUMBERS = (
    math.nan, math.inf, -math.inf, -1, 0, 1, -0.0, 0.5, 1.5, 2, 7, 1e-320, 1e308, 2**31, 2**63, 2**64,
    -(2**70),
)
TEXTS = ("", " ", "nan", "1e999", "a\0b", "x" * 5000, "\udcff", "é\u2028", "[/red]", "../..", "%s{0}")
NESTED = ([], {}, [0] * 3000, {"a": {"b": [1, None]}}, [[[[1]]]], [None])
VALUES = (*NUMBERS, *NUMBERS, *TEXTS, *NESTED, None, True, False)
RAW = (
    "0x_", "2024-99-99", "&a[*a]", "!!python/name:os.system", "1_0", "0o17", "12:30:45", "'", ".nan", "NaN",
    "1e999", "-Infinity", "<<: 3", "? x", "*b", "|", "={}", "\0", "\t", "\ud800", "9" * 5000, "[" * 3000,
    "{a: " * 500, "- - -",
    "{b: &b [0,0,0,0,0,0,0,0,0], c: &c [*b,*b,*b,*b,*b,*b,*b,*b], d: &d [*c,*c,*c,*c,*c,*c]}",
)
OVER = (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
NO_WEIGHTS = (b"", POINTER, b"<!DOCTYPE html>", b"PK\3\4", b"\x80\x02}q.")
LINKS = ("/dev/zero", "/dev/full", "/dev/tty", "/proc/self/mem", "x.png", "gone", ".")
SHARDS = (
    "t-{0..99999999999}.tar", "{a..b}.tar", "t-{1..0}.tar", "t-{0..3}.tar", "{{0..9}..9}.tar", "_info.json",
)
TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"S", b"z")
FEW = {"workers", "jobs", "threads", "shard"}
# fmt: on
Rng = random.Random


def mutated(rng: Rng, tree: Any) -> Any:
    """Return a copy of nested mappings and lists with values replaced, removed, renamed and wrapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        pending = [tree]
        while pending:
            node = pending.pop()
            places += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
            values = node.values() if isinstance(node, dict) else node
            pending += [each for each in values if isinstance(each, (dict, list))]
        if not places:
            break
        (node, key), kind = rng.choice(places), rng.random()
        if key in FEW:
            node[key] = rng.choice((-1, 0, 1, math.nan, "x", None))
        elif kind < 0.75:
            node[key] = copy.deepcopy(rng.choice(VALUES)) if kind < 0.65 else f"@@{rng.randrange(len(RAW))}@@"
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
        given = rng.choice((*VALUES, *RAW, "x.json", "p.csv", str(home / "images"), "0/2", "cuda"))
        value = "none" if given is None else str(given)  # `models None` lists all models, which takes longer
        kind = rng.random()
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
