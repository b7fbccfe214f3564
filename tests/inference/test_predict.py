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
from localvit.inference import predict
from localvit.inference.checkpoint import load_checkpoint
from localvit.inference.prediction import Guess, Prediction, Shard, _Files, find_files
from localvit.inference.prediction_files import fingerprint, write_predictions
from localvit.inference.prediction_formats import COLUMNS, FORMS, Csv, JsonLines, Parquet
from tests.pictures import export_model, make_pictures

PARQUET = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is an extra")
ANY_FORM = pytest.mark.parametrize("suffix", [".csv", ".jsonl", pytest.param(".parquet", marks=PARQUET)])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A model and 61 pictures in two folders, one of them broken."""
    folder = tmp_path_factory.mktemp("predict")
    pictures = folder / "pictures"
    make_pictures(pictures, {"a": 30, "b": 31})
    (pictures / "b" / "7.png").write_bytes(b"broken")
    return export_model(folder / "model", 4, ["ant", "bee", "cat", "dog"]), [str(pictures)]


def rows(path):
    """What is in a file of predictions, as lists of values."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return [
            list(row.values())
            for file in sorted(path.iterdir())
            for row in parquet.read_table(file).to_pylist()
        ]
    text = path.read_text()
    return (
        list(csv.reader(text.splitlines()))
        if path.suffix == ".csv"
        else list(map(json.loads, text.splitlines()))
    )


class Stop(KeyboardInterrupt):
    """As Ctrl-C."""


def stop_after(pictures):
    def watch(progress, _batch):
        if progress.written >= pictures:
            raise Stop

    return watch


def test_predictions_are_the_models_in_the_order_of_the_files(job):
    checkpoint, paths = job
    found = list(predict(checkpoint, paths, batch_size=4, device="cpu", top_k=9))
    assert [p.path for p in found] == find_files(paths)
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
    with pytest.raises(ConfigError, match=f"shard {index}/{count} is none of"):
        Shard(index=index, count=count)


def test_files_are_in_one_order_on_every_machine(tmp_path, monkeypatch):
    names = ["a10.png", "a2.png", "A2.png", "a02.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    expected = [str(tmp_path / name) for name in ("A2.png", "a02.png", "a2.png", "a10.png")]
    for order in (names, names[::-1]):  # as different file systems list them
        monkeypatch.setattr("os.walk", lambda path, order=order: [(path, [], order)])
        assert find_files([str(tmp_path)]) == expected


NASTY = [
    Prediction(
        path='a, "b".png', guesses=(Guess(label="x,y", probability=0.75), Guess(label="z", probability=0.25))
    ),
    Prediction(path="two\nlines.png", error="it is\nbroken"),
    Prediction(path="no text \udcff.png", guesses=(Guess(label="é", probability=1.0),)),
    Prediction(
        path="last.png", guesses=(Guess(label="x,y", probability=0.5), Guess(label="z", probability=0.5))
    ),
]


@pytest.mark.parametrize("form", [Csv, JsonLines])
def test_wherever_a_file_is_cut_it_is_continued_to_what_it_would_have_been(form, tmp_path):
    path = tmp_path / "whole"
    file = form(path)
    assert file.recover() == {}
    file.append(NASTY)
    file.close()
    whole = path.read_bytes()
    assert whole.count(b"\xff") == (form is Csv)  # JSON escapes it
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        file = form(path)
        known = file.recover()
        file.append([one for one in NASTY if file.name(one.path) not in known])
        file.close()
        assert path.read_bytes() == whole
        assert list(known) == [one.path for one in NASTY][: len(known)]
        assert all(known[one.path] == (one.error is not None) for one in NASTY if one.path in known)


@pytest.mark.parametrize(
    ("form", "content"),
    [
        (JsonLines, b"{}\n"),
        (JsonLines, b"no JSON\n"),
        (JsonLines, b"[1]\n"),
        (Csv, b"some,other,table\n1,2,3\n"),
    ],
)
def test_a_file_of_something_else_is_not_touched(form, content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    file = form(tmp_path / "file")
    with pytest.raises(ConfigError, match="is damaged at byte 0"):
        file.recover()
    file.close()
    assert (tmp_path / "file").read_bytes() == content


@PARQUET
def test_parquet_is_written_in_whole_files(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr(Parquet, "pictures_per_file", 2)
    file = Parquet(tmp_path / "found")
    assert file.recover() == {}
    file.append(NASTY[:3])
    file.append(NASTY[3:])
    assert len(list((tmp_path / "found").glob("*.parquet"))) == 1
    file.close()  # interrupted: what waits is kept
    assert len(list((tmp_path / "found").iterdir())) == 2
    again = Parquet(tmp_path / "found")
    assert list(again.recover()) == [again.name(one.path) for one in NASTY]
    assert list(again.recover().values()) == [False, True, False, False]
    table = parquet.read_table(tmp_path / "found")
    assert tuple(table.column_names) == COLUMNS
    assert table.column("rank").to_pylist() == [1, 2, None, 1, 1, 2]
    (tmp_path / "found" / "part-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"part-00000\.parquet' is damaged"):
        again.recover()


@ANY_FORM
def test_an_interrupted_file_goes_on_where_it_was(job, tmp_path, suffix, monkeypatch):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    settings = {"batch_size": 8, "device": "cpu", "top_k": 2}
    done = write_predictions(*job, str(whole), **settings)
    assert (done.total, done.kept, done.written, done.unreadable) == (61, 0, 61, 1)
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
    kept = 22 if suffix == ".csv" else 24  # the last picture before each interruption is done again
    assert (done.total, done.kept, done.written, done.unreadable) == (61, kept, 61 - kept, 1)
    assert read == find_files(job[1])[kept:]
    assert rows(cut) == rows(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [cut.name, whole.name]


@ANY_FORM
def test_a_finished_file_is_left_alone(job, tmp_path, suffix):
    path = tmp_path / f"found{suffix}"
    path.mkdir() if suffix == ".parquet" else path.write_text("mine")
    with pytest.raises(ConfigError, match="is finished already"):
        write_predictions(*job, str(path), device="cpu")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_continued_in_another_way(job, tmp_path):
    checkpoint, paths = job
    output = str(tmp_path / "found.csv")
    with pytest.raises(Stop):
        write_predictions(checkpoint, paths, output, device="cpu", watch=stop_after(32))
    before = (tmp_path / "found.csv.part").read_bytes()
    for other in ({"top_k": 3}, {"shard": Shard(index=0, count=2)}):
        with pytest.raises(ConfigError, match=f"'found.csv.part' was begun with {next(iter(other))}="):
            write_predictions(checkpoint, paths, output, device="cpu", **other)
    model = export_model(tmp_path / "model", 4, ["ant", "bee", "cat", "dog"])
    weights = load_checkpoint(model, torch.device("cpu"))
    assert fingerprint(weights) != fingerprint(load_checkpoint(checkpoint, torch.device("cpu")))
    with pytest.raises(ConfigError, match="was begun with checkpoint="):
        write_predictions(model, paths, output, device="cpu")
    assert (tmp_path / "found.csv.part").read_bytes() == before
    (tmp_path / "found.csv.part.json").write_text("")
    with pytest.raises(ConfigError, match="does not say how it was begun"):
        write_predictions(checkpoint, paths, output, device="cpu")


def test_weights_that_changed_under_their_name_are_noticed(job, tmp_path):
    model, output = export_model(tmp_path / "model", 4), str(tmp_path / "found.jsonl")
    with pytest.raises(Stop):
        write_predictions(model, job[1], output, device="cpu", watch=stop_after(32))
    torch.manual_seed(1)
    export_model(tmp_path / "model", 4)
    with pytest.raises(ConfigError, match="was begun with weights="):
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
    assert "another process is writing it" in results.get(timeout=60)
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


@ANY_FORM
def test_a_shard_without_pictures_is_an_empty_file(job, tmp_path, suffix):
    picture = find_files(job[1])[:1]
    path = tmp_path / f"found{suffix}"
    done = write_predictions(job[0], picture, str(path), device="cpu", shard=Shard(index=0, count=2))
    assert done.total == 0
    assert rows(path) == ([list(COLUMNS)] if suffix == ".csv" else [])


def test_what_is_missing_for_parquet_is_said(job, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'localvit\[parquet\]'"):
        write_predictions(*job, str(tmp_path / "found.parquet"), device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["found.txt", "found", "nowhere/found.csv"])
def test_files_that_cannot_be_written_are_refused(job, tmp_path, name):
    with pytest.raises(ConfigError, match=r"must end in \.csv, \.jsonl, \.parquet|no writable folder"):
        write_predictions(*job, str(tmp_path / name), device="cpu")
    assert set(FORMS) == {".csv", ".jsonl", ".parquet"}


@ANY_FORM
@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_full_disk_is_one_error_and_the_same_call_goes_on(job, tmp_path, full_disk, suffix, size):
    path = tmp_path / f"found{suffix}"
    with full_disk(size), pytest.raises(WriteFailed, match=rf"found{suffix}' cannot be written: .*too large"):
        write_predictions(*job, str(path), batch_size=8, device="cpu")
    assert not path.exists()
    assert not list(tmp_path.glob("**/part-*.parquet"))
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


@PARQUET
def test_an_error_that_only_closing_the_file_shows_is_not_lost(job, tmp_path, monkeypatch):
    """Some file systems say only then that there is no room."""

    def no_room(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(WriteFailed, match="No space left on device"):
        write_predictions(*job, str(tmp_path / "found.parquet"), device="cpu")
    assert not (tmp_path / "found.parquet").exists()
    assert not list(tmp_path.glob("**/part-*.parquet"))
