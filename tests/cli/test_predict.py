import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from localvit.cli import main
from tests.images import export_model, make_images

SLOWLY = """
import importlib, sys, time
from localvit.cli import main
module = importlib.import_module("localvit.inference.prediction")
decode = module.decode
module.decode = lambda *a: (time.sleep(0.03), decode(*a))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments that classify sixty images with a tiny model."""
    folder = tmp_path_factory.mktemp("predict")
    checkpoint = export_model(folder / "model", 3, ["[ant]", "bee", "cat"])
    images = make_images(folder / "images", {"x": 60})
    return ["predict", "--checkpoint", checkpoint, "--device", "cpu", "--top-k", "2", images]


def paths(file):
    return [json.loads(line)["path"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)], ids=["SIGTERM", "Ctrl-C with workers"]
)
def test_an_interruption_leaves_what_the_same_command_goes_on_with(job, tmp_path, number, workers, capsys):
    output = tmp_path / "found.jsonl"
    part = tmp_path / "found.jsonl.part.jsonl"
    command = [*job, "--output", str(output), "--batch-size", "4", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job of a shell ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    # A terminal sends Ctrl-C to the workers too; a scheduler terminates the process that it started.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    error = process.communicate()[1]
    assert (process.returncode, error.count("\n")) == (0, 1), error
    assert "of 60 images; the same command resumes" in error
    assert not output.exists()
    before = part.read_bytes()
    assert main(command) == 0
    out = capsys.readouterr().out
    lines = before.count(b"\n")
    assert f"resumed after {lines} of 60" in out
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert len(set(paths(output))) == len(paths(output)) == 60
    assert [p.name for p in tmp_path.iterdir()] == ["found.jsonl"]


def test_an_interruption_on_the_console_is_one(job, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("localvit.inference.classify", stop)
    assert main(job) == 130


def test_files_that_are_no_images_are_named(job, tmp_path, capsys):
    folder = tmp_path / "mixed"
    make_images(folder, {"x": 2})
    for name in ("x/one.HEIC", "x/two.heic", "notes.txt"):
        (folder / name).write_text("no image")
    note = "left out because their suffix is not that of an image: 2 .heic, 1 .txt"
    for output in ([], ["--output", str(tmp_path / "found.csv")]):
        assert main([*job[:-1], str(folder), *output]) == 0
        assert note in capsys.readouterr().err


def test_the_form_that_ran_is_named(job, tmp_path, capsys):
    for option, form in (([], "PyTorch, fused"), (["--no-fuse"], "PyTorch")):
        assert main([*job, *option]) == 0
        assert capsys.readouterr().err == f"localvit: {job[2]}: {form}\n"
        output = tmp_path / f"{len(option)}.csv"
        assert main([*job, *option, "--output", str(output)]) == 0
        assert capsys.readouterr().out == f"{output}: 60 images ({form})\n"


@pytest.mark.parametrize(("arguments", "lines"), [(["--format", "csv"], 1), ([], 0)])
def test_a_reader_that_ends_early_ends_the_command_quietly(job, arguments, lines, monkeypatch, capsys):
    """As `| head -1`, and as a pipe that nobody reads at all."""
    read, write = os.pipe()

    def head():
        with open(read) as reader:
            return [reader.readline() for _ in range(lines)]

    buffering = 1 if lines else -1  # a line at a time, or all at the end
    with ThreadPoolExecutor() as pool, open(write, "w", buffering) as pipe, monkeypatch.context() as patch:
        shown = pool.submit(head)
        patch.setattr(sys, "stdout", pipe)
        assert main([*job, "--batch-size", "1", *arguments]) == 141
    assert all(shown.result())
    assert capsys.readouterr().err == f"localvit: {job[2]}: PyTorch, fused\n"


def test_any_verb_ends_quietly_where_nobody_reads():
    command = [sys.executable, "-m", "localvit", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_every_name_of_a_file_reaches_the_console(job, tmp_path, monkeypatch):
    """Bytes that are not UTF-8 stay; what would move the cursor is escaped where people read."""
    names = [b"no text \xff.png", b"a\rb\x1b[2J.png", b"-x \xc3\xa9.png"]
    image = (Path(job[-1]) / "x" / "0.png").read_bytes()
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(image)
    found = {}
    for form in ("table", "csv"):
        console = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="utf-8"))
            assert main([*job[:-1], str(tmp_path), "--format", form]) == 0
            found[form] = console.getvalue()
    assert all(name in found["csv"] for name in names)
    assert names[0] in found["table"]
    assert names[2] in found["table"]
    assert rb"a\rb\x1b[2J.png" in found["table"]
    assert found["table"].count(b"\n") == 1 + 2 * 3


def test_processes_and_shards_write_the_same_files(job, tmp_path, monkeypatch, capsys):
    assert main([*job, "--output", str(tmp_path / "all.jsonl")]) == 0
    for i in range(2):
        capsys.readouterr()
        assert main([*job, "--output", str(tmp_path / f"{i}.jsonl"), "--shard", f"{i}/2"]) == 0
        count, found = len(paths(tmp_path / f"{i}.jsonl")), len(paths(tmp_path / "all.jsonl"))
        assert f"{i}.jsonl: {count} of {found} images (" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    for i in range(2):
        monkeypatch.setenv("RANK", str(i))
        assert main([*job, "--output", str(tmp_path / "found.jsonl")]) == 0
        assert paths(tmp_path / f"found-{i}-of-2.jsonl") == paths(tmp_path / f"{i}.jsonl")
    joined = [path for i in range(2) for path in paths(tmp_path / f"{i}.jsonl")]
    assert joined == paths(tmp_path / "all.jsonl")
    capsys.readouterr()
    for wrong in (["--shard", "0/2", "--output", str(tmp_path / "x.csv")], []):
        assert main([*job, *wrong]) == 2
        assert "torchrun" in capsys.readouterr().err


COUNTS = ("batch-size", "top-k", "workers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "old.csv"], "'old.csv' is already finished"),
        (["--output", "found.txt"], "a name that ends in .csv, .jsonl, .parquet"),
        (["--output", "found.csv", "--format", "json"], "--format json is not accepted for found.csv"),
        (["--shard", "2/2"], "shard 2/2 is not accepted; use 0/2 to 1/2"),
        (["--shard", "second"], "--shard second is not accepted"),
        (["--top-k", "0"], "top_k=0 is not accepted; use at least 1"),
        *((["--" + name, str(2**64)], f"--{name} {2**64} is not accepted; use at most") for name in COUNTS),
    ],
)
def test_wrong_use_is_one_line(job, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text("old")
    assert main([*job, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["old.csv"]


def test_every_format_of_the_console_tells_the_same(job, capsys):
    found = {}
    for form in ("table", "json", "jsonl", "csv"):
        assert main([*job, "--format", form]) == 0
        found[form] = capsys.readouterr().out
    predictions = json.loads(found["json"])
    assert predictions == [json.loads(line) for line in found["jsonl"].splitlines()]
    assert len(predictions) == 60
    first = predictions[0]["guesses"][0]
    for form, place in (("csv", 2), ("table", 1)):
        line = found[form].splitlines()[1]
        fields = line.split(",") if form == "csv" else line.split()
        assert fields[place] == first["label"]
        assert len(found[form].splitlines()) == 1 + 2 * 60


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_full_disk_is_one_line(job, tmp_path, full_disk, capsys, suffix):
    output = tmp_path / f"found.{suffix}"
    with full_disk(300):
        assert main([*job, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{str(output)!r} cannot be written: File too large" in error
    assert "the same command resumes" in error
    assert not output.exists()
