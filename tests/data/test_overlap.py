"""No image is in two splits, however the folders are named."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from localvit.cli import main
from localvit.data.config import DataConfig, DataError
from localvit.data.identity import image_name
from localvit.data.overlap import equal_contents
from localvit.data.splits import open_splits, open_test_split
from tests.data.conftest import write_tar

CLASSES = {"a": 10, "b": 10}
TINY = [
    "--model=vit_tiny_patch16_224",
    "--set=schedule.warmup_epochs=0",
    "--epochs=1",
    "--device=cpu",
    "--batch-size=4",
]


def names(part):
    return {os.path.realpath(image_name(part, i)) for i in range(len(part))}


def assert_disjoint(splits):
    for one, other in itertools.combinations((splits.train, splits.validation, splits.test), 2):
        assert not names(one) & names(other)


@pytest.fixture
def plain(make_folder, tmp_path, monkeypatch):
    """`d`; `linked`, whose classes link to it; `mixed`, with a hard link to it; `other`, with none."""
    make_folder("d", CLASSES)
    make_folder("other", CLASSES)
    make_folder("mixed", CLASSES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    for name in CLASSES:
        (tmp_path / "linked" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "linked" / name).symlink_to(tmp_path / "d" / name)
    os.link(tmp_path / "d" / "b" / "3.png", tmp_path / "mixed" / "b" / "hard.png")
    return tmp_path


@pytest.fixture
def split(make_folder, tmp_path, monkeypatch):
    """`s` with `train` and `val`, `t` with `test` as well; the folder above is the current one."""
    for name in ("s/train", "s/val", "t/train", "t/val", "t/test"):
        make_folder(name, CLASSES)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("inner", ["d", "./d/../d", "{}/d", "link", "linked", "../{name}/d", "mixed"])
@pytest.mark.parametrize("which", ["test", "validation"])
def test_a_source_with_training_images_is_refused(plain, inner, which):
    inner = inner.format(plain, name=plain.name)
    share = "1 of its 21" if inner == "mixed" else "all of its 20"
    with pytest.raises(
        DataError,
        match=rf"data\.{which}=.* shares {share} images with data\.train='d'.*, such as '.*/[ab]/.*\.png'; "
        rf".*leave data\.{which}.* out, or allow it with --allow-overlap",
    ) as error:
        open_splits(DataConfig(train="d", **{which: inner}))
    assert repr(inner) in str(error.value)


def test_other_pairs_of_sources_are_compared_too(plain):
    with pytest.raises(
        DataError, match=r"data\.test='d' \(--val-data\) shares .* with data\.train='linked' \(--data\)"
    ):
        open_splits(DataConfig(train="linked", test="d"))
    with pytest.raises(
        DataError, match=r"data\.validation='linked' shares .* with data\.test='d' \(--val-data\)"
    ):
        open_splits(DataConfig(train="other", test="d", validation="linked"))


def test_an_overlap_that_is_allowed_is_counted_in_the_notes(plain):
    splits = open_splits(DataConfig(train="d", test="mixed", allow_overlap=True))
    assert len(splits.test) == 21
    (note,) = (note for note in splits.notes if note.startswith("overlap allowed"))
    assert "1 of its 21 images with " in note


@pytest.mark.parametrize("names", [("a.tar", "a.tar"), ("a.tar", "hard.tar"), ("a.tar", "./x/../a.tar")])
def test_archives_are_compared_by_identity_and_member(plain, make_tar, names):
    make_tar("a.tar", CLASSES)
    os.link("a.tar", "hard.tar")
    os.mkdir("x")
    with pytest.raises(DataError, match=r"shares all of its 20 images with .*, such as '.*\.tar:a/0\.png'"):
        open_splits(DataConfig(train=names[0], test=names[1]))
    make_tar("b.tar", CLASSES)
    assert len(open_splits(DataConfig(train="a.tar", test="b.tar")).test) == 20


def test_sources_without_files_are_compared():
    with pytest.raises(DataError, match=r"data\.validation='digits' shares .* with data\.test='digits'"):
        open_splits(DataConfig(train="digits", test="digits", validation="digits"))


def test_equal_contents_are_counted(plain):
    os.mkdir("copies")
    shutil.copytree("d", "copies/train")
    shutil.copytree("other", "copies/test")
    shutil.copy("d/a/1.png", "copies/test/b/copy.png")
    for i in range(3, 9):
        Path(f"copies/test/a/{i}.png").write_bytes(os.urandom(200 + i))
    splits = open_splits(DataConfig(train="copies"))
    parts = {"train": splits.train, "test": splits.test}
    expected = {Path(name).read_bytes() for name in names(splits.train)}
    count = sum(p.read_bytes() in expected for p in Path("copies/test").rglob("*.png"))
    (note,) = equal_contents(parts)
    assert f"warning: {count} of 21 test images have the same content as train images, such as" in note
    (note,) = equal_contents(parts, most=20)
    assert "contents were not compared; run `localvit data check` to compare them" in note


def test_equal_pieces_are_not_equal_contents(plain):
    for i, folder in enumerate(("d/train", "d/test")):
        for name in CLASSES:
            os.makedirs(f"p{folder}/{name}")
            for k in range(3):
                Path(f"p{folder}/{name}/{k}.png").write_bytes(bytes([i, *map(ord, name), k]) + bytes(20_000))
    splits = open_splits(DataConfig(train="pd"))
    assert equal_contents({"train": splits.train, "test": splits.test}) == []


def test_the_command_line_refuses_it_in_one_line(plain, capsys):
    command = ["train", *TINY, "--data", "d", "--val-data", "link", "--output", "run"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'link' (--val-data)" in error
    assert "'d' (--data)" in error
    assert not (plain / "run").exists()


@pytest.mark.parametrize("test", ["s/val", "s", "./s/../s/val"])
def test_the_split_that_is_reported_does_not_choose(split, test):
    splits = open_splits(DataConfig(train="s", test=test))
    assert_disjoint(splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 20)
    assert "held out from 's'" in splits.notes[0]
    assert names(splits.test) == names(open_test_split("s/val", DataConfig()))


def test_folders_beside_the_training_folder_are_accepted(split):
    for config in (
        DataConfig(train="s/train", test="s/val"),
        DataConfig(train="s/train", test="s"),
        DataConfig(train="t", test="t/test"),
        DataConfig(train="t", test="t/val"),
        DataConfig(train="t", test="t/test", validation="t/val"),
    ):
        assert_disjoint(open_splits(config))


def test_a_choice_on_the_reported_split_is_refused(split):
    with pytest.raises(
        DataError, match=r"data\.validation='t/test' shares .* with the test split of data\.train='t'"
    ):
        open_splits(DataConfig(train="t", validation="t/test"))
    with pytest.raises(
        DataError, match=r"data\.validation='s/val' shares .* with the test split of data\.train='s'"
    ):
        open_splits(DataConfig(train="s", validation="s/val"))
    with pytest.raises(DataError, match=r"data\.validation='s/val' shares .* with data\.test='s'"):
        open_splits(DataConfig(train="t/train", test="s", validation="s/val"))


@pytest.mark.parametrize("link", ["test", "Testing"])
def test_a_test_split_that_is_a_link_to_another_one_is_refused(split, link):
    for target in ("val", "train"):
        os.symlink(target, f"s/{link}")
        with pytest.raises(DataError, match=r"the .* split of data\.train='s' .* such as 's/.*/a/0\.png'"):
            open_splits(DataConfig(train="s"))
        os.unlink(f"s/{link}")


def test_the_training_split_is_not_reported(split):
    with pytest.raises(
        DataError, match=r"data\.test='s/train' \(--val-data\) shares .* with data\.train='s'"
    ):
        open_splits(DataConfig(train="s", test="s/train"))


def test_shards_in_two_splits_are_refused(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, ("x.png", b""), ("x.cls", b"1"), ("y.png", b""), ("y.cls", b"0"))
    config = {"train": "wds/d", "root": str(tmp_path), "train_split": "{0..1}.tar", "holdout": 0.3}
    with pytest.raises(
        DataError, match=r"the test split of data\.train='wds/d' shares .* with data\.train='wds/d'"
    ):
        open_splits(DataConfig(**config, test_split="1.tar"))


@pytest.mark.parametrize("case", [str.upper, str.capitalize])
def test_split_folders_are_found_in_any_case(make_folder, tmp_path, case):
    for name in ("train", "val", "test"):
        make_folder(f"s/{case(name)}", CLASSES)
    splits = open_splits(DataConfig(train=str(tmp_path / "s")))
    assert_disjoint(splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 20, 20)
    assert names(open_test_split(str(tmp_path / "s"), DataConfig())) == names(splits.test)


@pytest.mark.parametrize("pair", [("Train", "train"), ("VAL", "val")])
def test_a_split_folder_in_two_cases_is_refused(make_folder, tmp_path, pair):
    for name in {"train", *pair}:
        make_folder(f"s/{name}", CLASSES)
    if len(os.listdir(tmp_path / "s")) < len({"train", *pair}):
        pytest.skip("the file system ignores case")
    with pytest.raises(DataError, match=rf"'{pair[0]}' and '{pair[1]}'.*rename one"):
        open_splits(DataConfig(train=str(tmp_path / "s")))


def test_classes_called_test_in_two_cases_are_classes(make_folder):
    splits = open_splits(DataConfig(train=str(make_folder("words", {"Test": 10, "test": 10}))))
    assert splits.class_names == ("Test", "test")
