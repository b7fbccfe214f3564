import csv
import errno
import importlib.util
import json
import multiprocessing
import os

import pytest
import torch
from hypothesis import given, strategies as st

from localvit.atomic import WriteFailed
from localvit.errors import ConfigError
from localvit.inference import formats, open_model, predict
from localvit.inference.formats import (
    COLUMNS,
    FORMATS,
    from_json_line,
    to_json_line,
    write_csv,
    write_parquet,
)
from localvit.inference.prediction import ClassProbability, Prediction, Shard, _Files, find_files
from localvit.inference.writer import PredictionWriter, write_predictions
from tests.images import export_model, make_images

ANY_FORM = pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A model and 61 images in two folders, one of them broken."""
    folder = tmp_path_factory.mktemp("predict")
    photos = folder / "images"
    make_images(photos, {"a": 30, "b": 31})
    (photos / "b" / "7.png").write_bytes(b"broken")
    return export_model(folder / "model", 4, ["ant", "bee", "cat", "dog"]), [str(photos)]


def rows(path):
    """Return the rows of a file of predictions, as lists of values."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return [
            list(row.values())
            for file in sorted(path.iterdir())
            for row in parquet.read_table(file).to_pylist()
        ]
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file) if path.suffix == ".csv" else map(json.loads, file))


class Stop(KeyboardInterrupt):
    """As Ctrl-C."""


def stop_after(count):
    def watch(progress, _batch):
        if progress.written >= count:
            raise Stop

    return watch


def test_one_path_may_be_a_string(job, tmp_path):
    (folder,) = job[1]
    assert list(predict(job[0], folder, device="cpu")) == list(predict(job[0], [folder], device="cpu"))
    write_predictions(job[0], folder, str(tmp_path / "one.csv"), device="cpu")
    write_predictions(job[0], [folder], str(tmp_path / "other.csv"), device="cpu")
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "other.csv").read_text()


def test_predictions_are_the_models_in_the_order_of_the_files(job):
    checkpoint, paths = job
    found = list(predict(checkpoint, paths, batch_size=4, device="cpu", top_k=9))
    assert [p.path for p in found] == find_files(paths).files
    assert [p.error is None for p in found].count(False) == 1
    whole = list(predict(checkpoint, paths, batch_size=61, device="cpu"))
    assert [[g.label for g in p.guesses] for p in found] == [[g.label for g in p.guesses] for p in whole]
    assert sum(g.probability for g in found[0].guesses) == pytest.approx(1)
    assert len({p.guesses[0].label for p in found if p.guesses}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_than_a_few_batches_are_in_memory(job, monkeypatch, workers):
    read = multiprocessing.get_context("fork").Value("i", 0)
    original = _Files.__getitem__

    def counted(self, index):
        with read.get_lock():
            read.value += 1
        return original(self, index)

    monkeypatch.setattr(_Files, "__getitem__", counted)
    stream = predict(*job, batch_size=4, workers=workers, device="cpu")
    assert read.value <= 4 * 2 * workers  # nothing is read before it is asked for, but for the workers
    ahead = [read.value - done for done, _ in enumerate(stream, start=1)]
    assert max(ahead) <= 4 * (2 * workers + 1)
    assert read.value == 61


@given(count=st.integers(1, 9), length=st.integers(0, 40))
def test_shards_are_even_blocks_of_the_whole(count, length):
    files = [str(i) for i in range(length)]
    blocks = [Shard(index=i, count=count).take(files) for i in range(count)]
    assert [file for block in blocks for file in block] == files
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none_is_refused(index, count):
    with pytest.raises(ConfigError, match=f"shard {index}/{count} is not accepted; use 0/"):
        Shard(index=index, count=count)


def test_files_are_in_one_order_on_every_machine(tmp_path, monkeypatch):
    names = ["a10.png", "a2.png", "A2.png", "a02.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    expected = [str(tmp_path / name) for name in ("A2.png", "a02.png", "a2.png", "a10.png")]
    for order in (names, names[::-1]):  # as different file systems list them
        monkeypatch.setattr("os.walk", lambda path, order=order: [(path, [], order)])
        assert find_files([str(tmp_path)]).files == expected


def chance(label, probability):
    return ClassProbability(label=label, probability=probability)


NASTY = [
    Prediction(
        path='a, "b".png',
        guesses=(
            chance("x,y", 0.75),
            chance("z", 0.25),
        ),
    ),
    Prediction(path="two\nlines.png", error="it is\nbroken"),
    Prediction(path="no text \udcff.png", guesses=(chance("é", 1.0),)),
    Prediction(
        path="a\rb\x1b[2J\x00\x0c\u2028=.png",
        guesses=(
            chance("x,y", 0.5),
            chance("z", 0.5),
        ),
    ),
]


def write(path, predictions):
    """Write predictions as `write_predictions` does; those that are in the file already are left out."""
    with PredictionWriter(path, [one.path for one in predictions]) as file:
        known = file.images, file.unreadable
        file.append(predictions[file.images :])
    return known


def test_wherever_a_file_is_cut_it_is_resumed_to_what_it_would_have_been(tmp_path):
    path, part = tmp_path / "found.csv", tmp_path / "found.csv.part.jsonl"
    assert write(path, NASTY) == (0, 0)
    whole = part.read_bytes()
    assert whole.isascii()
    for cut in range(len(whole) + 1):
        part.write_bytes(whole[:cut])
        images = whole[:cut].count(b"\n")
        assert write(path, NASTY) == (images, sum(one.error is not None for one in NASTY[:images]))
        assert part.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"{}\n", 0),
        (b"no JSON\n", 0),
        (b"[1]\n", 0),
        (b"null\n", 0),
        (b'{"path": "x", "guesses": [], "error": null}\n', 0),
        (to_json_line(NASTY[0]).encode() + b'{"path": 1, "guesses": [], "error": null}\n', None),
        (b"".join(to_json_line(one).encode() for one in [*NASTY, NASTY[0]]), None),
    ],
    ids=["empty", "text", "list", "null", "another image", "number", "too many"],
)
def test_a_damaged_file_is_refused_and_not_touched(content, byte, tmp_path):
    part = tmp_path / "found.csv.part.jsonl"
    part.write_bytes(content)
    where = content[:-1].rfind(b"\n") + 1 if byte is None else byte
    with pytest.raises(ConfigError, match=rf"found.csv.part.jsonl' is damaged at byte {where}; delete it"):
        write(tmp_path / "found.csv", NASTY)
    assert part.read_bytes() == content


def test_every_name_survives_in_every_format(tmp_path):
    for one in NASTY:
        assert from_json_line(to_json_line(one).encode()) == one
    write_csv(iter(NASTY), tmp_path / "found.csv")
    header, *found = rows(tmp_path / "found.csv")
    assert header == list(COLUMNS)
    names = [one.path for one in NASTY for _ in one.guesses or [None]]
    assert [row[0] for row in found] == names
    assert [row[2] for row in found] == [g.label for one in NASTY for g in one.guesses or [chance("", 0)]]
    assert b"no text \xff.png" in (tmp_path / "found.csv").read_bytes()


def test_parquet_is_written_in_files_of_so_many_images(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr(formats, "IMAGES_PER_FILE", 2)
    for images in (3, 4):
        folder = tmp_path / str(images)
        write_parquet(iter(NASTY[:images]), folder)
        assert sorted(file.name for file in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    table = parquet.read_table(folder)
    assert tuple(table.column_names) == COLUMNS
    assert table.column("rank").to_pylist() == [1, 2, None, 1, 1, 2]
    assert table.column("path").to_pylist()[3] == r"no text \udcff.png"


@ANY_FORM
def test_an_interrupted_file_is_resumed_where_it_was(job, tmp_path, suffix, monkeypatch):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    settings = {"batch_size": 8, "device": "cpu", "top_k": 2}
    done = write_predictions(*job, str(whole), **settings)
    assert (done.total, done.resumed, done.written, done.unreadable) == (61, 0, 61, 1)
    for stop in (16, 8):
        with pytest.raises(Stop):
            write_predictions(*job, str(cut), **settings, watch=stop_after(stop))
        assert not cut.exists()
    read = []
    original = _Files.__getitem__
    monkeypatch.setattr(
        _Files, "__getitem__", lambda self, i: (read.append(self.paths[i]), original(self, i))[1]
    )
    done = write_predictions(*job, str(cut), **settings)
    assert (done.total, done.resumed, done.written, done.unreadable) == (61, 24, 37, 1)
    assert read == find_files(job[1]).files[24:]
    assert rows(cut) == rows(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [cut.name, whole.name]


@ANY_FORM
def test_a_finished_file_is_left_alone(job, tmp_path, suffix):
    path = tmp_path / f"found{suffix}"
    path.mkdir() if suffix == ".parquet" else path.write_text("mine")
    with pytest.raises(ConfigError, match="is already finished"):
        write_predictions(*job, str(path), device="cpu")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_resumed_in_another_way(job, tmp_path, monkeypatch):
    checkpoint, paths = job
    output, part = str(tmp_path / "found.csv"), tmp_path / "found.csv.part.jsonl"
    with pytest.raises(Stop):
        write_predictions(checkpoint, paths, output, device="cpu", watch=stop_after(32))
    before = part.read_bytes()
    for other in ({"top_k": 3}, {"shard": Shard(index=0, count=2)}, {"fuse": False}):
        name = "form" if "fuse" in other else next(iter(other))
        with pytest.raises(ConfigError, match=f"'found.csv.part.jsonl' was started with {name}="):
            write_predictions(checkpoint, paths, output, device="cpu", **other)
    model = export_model(tmp_path / "model", 4, ["ant", "bee", "cat", "dog"])
    assert open_model(model, "cpu").fingerprint() != open_model(checkpoint, "cpu").fingerprint()
    with pytest.raises(ConfigError, match="was started with weights="):
        write_predictions(model, paths, output, device="cpu")
    assert part.read_bytes() == before
    (tmp_path / "found.csv.part.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"so 'found\.csv\.part\.jsonl' cannot be resumed"):
        write_predictions(checkpoint, paths, output, device="cpu")


@pytest.mark.parametrize("shard", [Shard(), Shard(index=1, count=2)], ids=["all", "shard"])
@pytest.mark.parametrize("change", ["spelling", "order", "subset", "grown", "renamed"])
def test_a_file_is_not_resumed_with_other_images(tmp_path, monkeypatch, shard, change):
    monkeypatch.chdir(tmp_path)
    model = export_model(tmp_path / "model", 4)
    make_images(tmp_path / "images", {"a": 20, "b": 20})
    settings = {"device": "cpu", "batch_size": 4, "shard": shard}
    with pytest.raises(Stop):
        write_predictions(model, ["images/a", "images/b"], "found.csv", **settings, watch=stop_after(8))
    before = (tmp_path / "found.csv.part.jsonl").read_bytes()
    paths = {
        "spelling": ["./images/a", "images/b"],
        "order": ["images/b", "images/a"],
        "subset": ["images/a"],
    }.get(change, ["images/a", "images/b"])
    if change == "grown":
        (tmp_path / "images/b/new.png").write_bytes((tmp_path / "images/b/0.png").read_bytes())
    if change == "renamed":
        (tmp_path / "images/b/1.png").rename(tmp_path / "images/b/one.png")
    with pytest.raises(ConfigError, match=r"was started with images='40 files, digest .*delete"):
        write_predictions(model, paths, "found.csv", **settings)
    assert (tmp_path / "found.csv.part.jsonl").read_bytes() == before


def test_what_an_older_version_began_is_named(job, tmp_path):
    (tmp_path / "found.csv.part").write_text("path,rank,label,probability,error\n")
    with pytest.raises(ConfigError, match=r"found.csv.part' is from an older version.*delete it"):
        write_predictions(*job, str(tmp_path / "found.csv"), device="cpu")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no such type")]
)
def test_a_failed_conversion_keeps_the_predictions_and_the_same_call_only_converts(
    job, tmp_path, monkeypatch, suffix, error
):
    path, convert = tmp_path / f"found{suffix}", FORMATS[suffix]

    def fails(predictions, new):
        convert(predictions, new)
        raise error

    monkeypatch.setitem(FORMATS, suffix, fails)
    with pytest.raises(WriteFailed, match=rf"found{suffix}' cannot be written: .*the same command"):
        write_predictions(*job, str(path), device="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"found{suffix}.part.json",
        f"found{suffix}.part.jsonl",
    ]
    monkeypatch.setitem(FORMATS, suffix, convert)
    monkeypatch.setattr(_Files, "__getitem__", lambda *_: pytest.fail("an image was read again"))
    done = write_predictions(*job, str(path), device="cpu")
    assert (done.total, done.resumed, done.written, done.unreadable) == (61, 61, 0, 1)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert len({row[0] for row in rows(path)} - {"path"}) == 61


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_while_it_grew_is_not_finished(job, tmp_path, replaced):
    part = tmp_path / "found.jsonl.part.jsonl"

    def watch(progress, _batch):
        if progress.done == progress.total:
            part.unlink()
            if replaced:
                part.write_text("of another process")

    with pytest.raises(WriteFailed, match=r"cannot be written|was replaced"):
        write_predictions(*job, str(tmp_path / "found.jsonl"), device="cpu", watch=watch)
    assert not (tmp_path / "found.jsonl").exists()
    assert part.exists() == replaced


def test_a_model_that_answers_nan_has_no_answer(job, tmp_path):
    model = open_model(job[0], "cpu")
    with torch.no_grad():
        model.model.head.bias[0] = float("nan")
    found = list(predict(model, job[1]))
    assert {one.error for one in found} - {"the model returns NaN"} == {
        one.error for one in predict(*job, device="cpu") if one.error
    }
    assert all(not one.guesses for one in found)


def test_weights_that_changed_under_their_name_are_noticed(job, tmp_path):
    model, output = export_model(tmp_path / "model", 4), str(tmp_path / "found.jsonl")
    with pytest.raises(Stop):
        write_predictions(model, job[1], output, device="cpu", watch=stop_after(32))
    torch.manual_seed(1)
    export_model(tmp_path / "model", 4)
    with pytest.raises(ConfigError, match="was started with weights="):
        write_predictions(model, job[1], output, device="cpu")


def _write(job, output, started, results):
    try:
        write_predictions(*job, output, device="cpu", watch=lambda *_: started.wait(30))
        results.put("done")
    except ConfigError as error:
        results.put(str(error))


def test_two_processes_do_not_write_one_file(job, tmp_path):
    context = multiprocessing.get_context("fork")
    go_on, results = context.Event(), context.Queue()
    arguments = (job, str(tmp_path / "found.jsonl"), go_on, results)
    processes = [context.Process(target=_write, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert "is in use" in results.get(timeout=60)
    go_on.set()
    assert results.get(timeout=60) == "done"
    for process in processes:
        process.join()


@ANY_FORM
def test_results_of_shards_are_those_of_all(job, tmp_path, suffix):
    settings = {"device": "cpu", "batch_size": 16}
    write_predictions(*job, str(tmp_path / f"all{suffix}"), **settings)
    joined = []
    for i in range(3):
        path = tmp_path / f"{i}{suffix}"
        write_predictions(*job, str(path), **settings, shard=Shard(index=i, count=3))
        joined += rows(path)[1 if suffix == ".csv" and i else 0 :]
    expected = rows(tmp_path / f"all{suffix}")
    assert len(joined) == len(expected)
    assert [labels(row) for row in joined] == [labels(row) for row in expected]


def labels(row):
    """A row without probabilities, which depend on the batch in their last digits."""
    if isinstance(row, dict):
        return row["path"], [guess["label"] for guess in row["guesses"]], row["error"]
    return [*row[:3], *row[4:]]


def test_shards_of_a_folder_that_grew_are_refused(job, tmp_path):
    images = tmp_path / "images"
    make_images(images, {"a": 12})
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()

    def classify(index, count=2, folder=out, **options):
        path, shard = folder / f"{index}-of-{count}.csv", Shard(index=index, count=count)
        return write_predictions(
            job[0], [str(images)], str(path), device="cpu", batch_size=4, shard=shard, **options
        )

    classify(0)
    (images / "a" / "new.png").write_bytes((images / "a" / "0.png").read_bytes())
    with pytest.raises(ConfigError, match=r"'0-of-2.csv.shard.json': shard 0/2 is of 12 files.*delete it"):
        classify(1)
    assert not (out / "1-of-2.csv").exists()
    classify(1, count=3)  # another division
    classify(1, folder=elsewhere)
    for path in out.glob("?-of-2.csv*"):
        path.unlink()
    with pytest.raises(Stop):
        classify(0, watch=stop_after(4))
    (images / "a" / "new.png").unlink()
    with pytest.raises(ConfigError, match=r"'0-of-2.csv.part.json': shard 0/2 is of 13 files"):
        classify(1)


@ANY_FORM
def test_a_shard_without_images_is_an_empty_file(job, tmp_path, suffix):
    photo = find_files(job[1]).files[:1]
    path = tmp_path / f"found{suffix}"
    done = write_predictions(job[0], photo, str(path), device="cpu", shard=Shard(index=0, count=2))
    assert done.total == 0
    assert rows(path) == ([list(COLUMNS)] if suffix == ".csv" else [])


def test_what_is_missing_for_parquet_is_said(job, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(ConfigError, match=r"pyarrow is missing; run pip install 'localvit\[parquet\]'"):
        write_predictions(*job, str(tmp_path / "found.parquet"), device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["found.txt", "found", "nowhere/found.csv"])
def test_files_that_cannot_be_written_are_refused(job, tmp_path, name):
    with pytest.raises(ConfigError, match=r"ends in \.csv, \.jsonl, \.parquet|the folder .* does not exist"):
        write_predictions(*job, str(tmp_path / name), device="cpu")
    assert set(FORMATS) == {".csv", ".jsonl", ".parquet"}


@ANY_FORM
@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_full_disk_is_one_error_and_the_same_call_goes_on(job, tmp_path, full_disk, suffix, size):
    path = tmp_path / f"found{suffix}"
    with full_disk(size), pytest.raises(WriteFailed, match=rf"found{suffix}' cannot be written: .*too large"):
        write_predictions(*job, str(path), batch_size=8, device="cpu")
    assert not path.exists()
    assert not list(tmp_path.glob("*.part.new*"))
    write_predictions(*job, str(path), batch_size=8, device="cpu")
    assert len({row["path"] if suffix == ".jsonl" else row[0] for row in rows(path)} - {"path"}) == 61
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@ANY_FORM
def test_a_full_disk_does_not_spoil_what_an_interrupted_call_left(job, tmp_path, full_disk, suffix):
    path = tmp_path / f"found{suffix}"
    with pytest.raises(Stop):
        write_predictions(*job, str(path), batch_size=8, device="cpu", watch=stop_after(16))
    beside = tmp_path / f"found{suffix}.part.json"
    begun = beside.read_bytes()
    with full_disk(0), pytest.raises(WriteFailed):
        write_predictions(*job, str(path), batch_size=8, device="cpu")
    assert beside.read_bytes() == begun
    write_predictions(*job, str(path), batch_size=8, device="cpu")
    assert path.exists()


def test_an_error_that_only_closing_the_file_shows_is_not_lost(job, tmp_path, monkeypatch):
    """Some file systems say only then that there is no room."""

    def no_room(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(WriteFailed, match="No space left on device"):
        write_predictions(*job, str(tmp_path / "found.parquet"), device="cpu")
    assert not (tmp_path / "found.parquet").exists()
    assert not list(tmp_path.glob("*.part.new*"))
