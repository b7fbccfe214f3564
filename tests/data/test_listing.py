"""Every image of a folder or archive is counted once, or the source is refused by name."""

import contextlib
import os
import tarfile
from pathlib import Path

import pytest

from localvit.data.config import DataConfig, DataError
from localvit.data.identity import image_name
from localvit.data.images import UnreadableImage
from localvit.data.split_names import split_of
from localvit.data.splits import open_splits, open_test_split
from localvit.errors import ConfigError
from localvit.inference.prediction import find_files
from tests.data.conftest import png, write_tar

CLASSES = {"a": 6, "b": 6}


def packed(folder: Path, **options) -> Path:
    """A tar of a folder."""
    with tarfile.open(folder.with_suffix(".tar"), "w", **options) as tar:
        tar.add(folder, arcname=folder.name)
    return folder.with_suffix(".tar")


def as_kind(folder: Path, kind: str) -> str:
    return str(packed(folder) if kind == "tar" else folder)


def all_of(source):
    splits = open_splits(DataConfig(train=str(source)))
    parts = (splits.train, splits.validation, splits.test)
    return splits, [image_name(part, i) for part in parts for i in range(len(part))]


both = pytest.mark.parametrize("kind", ["folder", "tar"])


@both
@pytest.mark.parametrize(
    "name",
    [
        ".hidden/0.png",
        "a/._0.png",
        "__MACOSX/a/0.png",
        "a/.ipynb_checkpoints/0.png",
        ".x.png",
        "@eaDir/0.png",
    ],
)
def test_hidden_files_are_left_out(make_folder, kind, name):
    folder = make_folder("d", CLASSES)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(png(7))
    splits, names = all_of(as_kind(folder, kind))
    assert splits.class_names == ("a", "b")
    assert len(names) == 12
    assert name not in " ".join(names)
    assert len(find_files([str(folder)]).files) == 12


@both
@pytest.mark.parametrize(
    ("add", "message"),
    [
        ("0.png", r"has images outside its class folders \(1\), such as '0.png'"),
        ("c/", "no images in the class folder 'c'"),
        ("c/notes.heic", "no images in the class folder 'c'"),
        ("c/.hidden.png", "no images in the class folder 'c'"),
        ("a/2023/0.png", "has images in 'a/2023', below the class folder 'a'"),
    ],
)
def test_images_without_a_class_and_classes_without_images_are_refused(make_folder, kind, add, message):
    folder = make_folder("d", CLASSES)
    if add.endswith("/"):
        (folder / add).mkdir()
    else:
        (folder / add).parent.mkdir(exist_ok=True)
        (folder / add).write_bytes(png(7))
    with pytest.raises(DataError, match=message):
        all_of(as_kind(folder, kind))


def test_a_folder_of_images_without_classes_is_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(png(7))
    with pytest.raises(DataError, match=r"has images but no class folders \(1\)"):
        open_test_split(str(tmp_path), DataConfig())


@both
def test_other_files_are_counted_in_a_note(make_folder, kind):
    folder = make_folder("d", CLASSES)
    (folder / "a" / "photo.heic").write_bytes(b"x")
    splits, names = all_of(as_kind(folder, kind))
    assert len(names) == 12
    assert "left out because their suffix is not that of an image: 1 .heic" in " ".join(splits.notes)


@both
@pytest.mark.parametrize(
    ("suffix", "form"),
    [("webp", "WEBP"), ("bmp", "BMP"), ("tif", "TIFF"), ("TIFF", "TIFF"), ("gif", "GIF"), ("avif", "AVIF")],
)
def test_formats_that_predict_reads_are_read_from_folders_and_archives(make_folder, kind, suffix, form):
    folder = make_folder("d", {"a": 1})
    (folder / "a" / f"1.{suffix}").write_bytes(png(200, form))
    part = open_test_split(as_kind(folder, kind), DataConfig())
    assert len(part) == 2
    assert abs(part[1][0].convert("L").getpixel((8, 8)) - 200) < 5


@pytest.mark.parametrize("where", ["a/loop", "loop", "a/deep/loop"])
def test_links_to_a_folder_above_are_not_followed(make_folder, where):
    folder = make_folder("d", CLASSES)
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).symlink_to(folder)
    assert len(all_of(folder)[1]) == 12
    assert len(find_files([str(folder)]).files) == 12


def test_links_are_followed_in_training_and_prediction(make_folder, tmp_path):
    folder = make_folder("d", CLASSES)
    links = tmp_path / "links"
    links.mkdir()
    (links / "a").symlink_to(folder / "a")
    (links / "b").mkdir()
    for i in range(6):
        (links / "b" / f"{i}.png").symlink_to(folder / "b" / f"{i}.png")
    assert len(all_of(links)[1]) == 12
    assert len(find_files([str(links)]).files) == 12


@pytest.mark.parametrize("kind", ["file", "folder", "itself"])
def test_a_link_that_leads_nowhere_is_named(make_folder, kind):
    folder = make_folder("d", CLASSES)
    link = folder / {"file": "a/x.png", "folder": "c", "itself": "a/y.png"}[kind]
    link.symlink_to(link if kind == "itself" else "/nowhere/at/all")
    for use in (all_of, lambda source: find_files([str(source)])):
        with pytest.raises(DataError, match=rf"{link.name}' is a broken link .*; remove it"):
            use(folder)


def test_what_is_no_regular_file_is_refused_before_it_is_opened(make_folder):
    folder = make_folder("d", CLASSES)
    os.mkfifo(folder / "a" / "x.png")
    for use in (
        all_of,
        lambda _: find_files([str(folder)]),
        lambda _: find_files([str(folder / "a" / "x.png")]),
    ):
        with pytest.raises(DataError, match=r"x\.png' is not a regular file"):
            use(folder)
    with pytest.raises(DataError, match="not a regular file"):
        find_files(["/dev/zero"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(make_folder):
    folder = make_folder("d", CLASSES)
    (folder / "a").chmod(0)
    with pytest.raises(DataError, match=r"'.*/a' cannot be read: Permission denied"):
        all_of(folder)


@both
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_with_two_names_in_a_class_is_one_image(make_folder, kind, link):
    folder = make_folder("d", CLASSES)
    for i in range(2, 5):
        (folder / "a" / f"{i}.png").unlink()
        link(folder / "a" / "1.png" if link is os.link else "1.png", folder / "a" / f"{i}.png")
    splits, names = all_of(as_kind(folder, kind))
    assert len(names) == 9
    assert "links to other images of their class: 3" in " ".join(splits.notes)


@both
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_in_two_classes_is_refused_unless_allowed(make_folder, kind, link):
    folder = make_folder("d", CLASSES)
    link(folder / "a" / "1.png" if link is os.link else "../a/1.png", folder / "b" / "x.png")
    source = as_kind(folder, kind)
    with pytest.raises(
        DataError, match=r"has images in two classes \(1\): 'a/1\.png' and 'b/x\.png' are the same file"
    ):
        all_of(source)
    splits = open_splits(DataConfig(train=source, allow_overlap=True))
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 13


@both
@pytest.mark.parametrize(
    "name", ["caf\udce9", "new\nline", "cr\r", "-x", "[x]", "<img onerror>", "\x1b[31m", "=1+1"]
)
def test_any_name_is_read(make_folder, kind, name):
    folder = make_folder("d", {"a": 6, name: 6})
    (folder / "a" / "0.png").rename(folder / "a" / f"{name}.png")
    splits, names = all_of(as_kind(folder, kind))
    shown = name.replace("\udce9", "\\xe9")
    assert set(splits.class_names) == {"a", shown}
    assert sum(f"/a/{name}.png" in one for one in names) == 1
    assert len(names) == 12


# Splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "train")
            for name in ("train", "Training", "TRAIN", "training_set", "train2017", "Train-Images")
        ),
        *((name, "test") for name in ("test", "Testing", "test_set", "Test data")),
        *(
            (name, "validation")
            for name in ("val", "valid", "Validation", "eval", "evaluation", "dev", "val_images")
        ),
        *(
            (name, None)
            for name in ("training wheels", "a", "protest", "set", "2017", "trainer", "testosterone")
        ),
    ],
)
def test_names_of_splits(name, split):
    assert split_of(name) == split


@both
@pytest.mark.parametrize("wrapped", [False, True])
def test_splits_inside_a_source(make_folder, tmp_path, kind, wrapped):
    for name, count in (("Training", 8), ("validation", 2), ("Testing", 3)):
        make_folder(f"s/{name}", {"a": count, "b": count})
    source = tmp_path / "s"
    if kind == "tar":
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            tar.add(source, arcname="./x/s" if wrapped else ".")
        source = tmp_path / "s.tar"
    splits, names = all_of(source)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 6)
    assert len(set(names)) == 26
    assert len(open_test_split(str(source), DataConfig())) == 6


@both
def test_a_tar_has_the_splits_of_its_folder(make_folder, tmp_path, kind):
    for name in ("train", "val"):
        make_folder(f"s/{name}", CLASSES)
    splits, names = all_of(as_kind(tmp_path / "s", kind))
    assert len(splits.test) == 12
    assert all("/val/" in one for one in names[-12:])


@both
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train", "holdout"),
            "'holdout' repeats the class 'a' of 'train', so it looks like a split; name it train",
        ),
        (("fold1", "fold2"), "the folders 'fold1', 'fold2' repeat the class 'a', so they look like splits"),
        (("train", "Training"), "name the same split; rename one"),
        (("train", "val", "valid"), "'val' and 'valid', which name the same split"),
        (("val", "test"), "has the splits validation, test; it needs one of train, all"),
    ],
)
def test_folders_that_look_like_splits_are_understood_or_refused(
    make_folder, tmp_path, kind, folders, message
):
    for name in folders:
        make_folder(f"s/{name}", CLASSES)
    with pytest.raises(DataError, match=message):
        all_of(as_kind(tmp_path / "s", kind))


@both
def test_a_class_called_train_is_a_class(make_folder, kind):
    folder = make_folder("d", {"train": 6, "plane": 6, "test": 6})
    assert all_of(as_kind(folder, kind))[0].class_names == ("plane", "test", "train")


@both
def test_what_lies_beside_splits_is_noted(make_folder, tmp_path, kind):
    for name in ("train", "test"):
        make_folder(f"s/{name}", CLASSES)
    make_folder("s/extra", {"more": 2})
    (tmp_path / "s" / "sample.png").write_bytes(png(7))
    splits, names = all_of(as_kind(tmp_path / "s", kind))
    assert len(names) == 24
    assert "folders that are not splits are left out ('extra')" in " ".join(splits.notes)
    assert "images outside its splits are left out (1)" in " ".join(splits.notes)


# Archives


def members(*classes, count=6, first=0):
    return [(f"{c}/{i}.png", png(10 * i + first)) for c in classes for i in range(count)]


def test_of_two_members_with_one_name_the_last_one_counts(tmp_path):
    path = write_tar(tmp_path / "d.tar", *members("a", "b"), ("./a/0.png", png(99)))
    part = open_test_split(str(path), DataConfig())
    assert len(part) == 12
    assert part[0][0].getpixel((0, 0)) == (99, 99, 99)


def test_links_in_an_archive_are_images(tmp_path):
    path = write_tar(
        tmp_path / "d.tar",
        *members("a"),
        *((f"b/{i}.png", b"", tarfile.SYMTYPE, f"../keep/{i}.dat") for i in range(6)),
        *((f"keep/{i}.dat", png(i)) for i in range(6)),
    )
    with pytest.raises(DataError, match="no images in the class folder 'keep'"):
        open_test_split(str(path), DataConfig())
    path = write_tar(
        tmp_path / "d.tar",
        *members("a", "b"),
        *(
            (f"{c}/x{i}.png", b"", k, t.format(i))
            for c, k, t in (("a", tarfile.LNKTYPE, "a/{}.png"), ("b", tarfile.SYMTYPE, "{}.png"))
            for i in range(2)
        ),
    )
    splits, names = all_of(path)
    assert len(names) == 12
    assert "links to other images of their class: 4" in " ".join(splits.notes)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("a/x.png", b"", tarfile.SYMTYPE, "/etc/x.png"), r"'a/x\.png' is a link to nothing in this archive"),
        (("c", b"", tarfile.SYMTYPE, "a"), r"'c' is a link to a folder \('a'\); repack it with tar --deref"),
        (("a/x.png", b"", tarfile.SYMTYPE, "x.png"), r"'a/x\.png' is a link to nothing"),
        (("a/x.png", b"", tarfile.LNKTYPE, "a/gone.png"), r"'a/x\.png' is a link to nothing"),
        (("a/x.png", b"", tarfile.FIFOTYPE, ""), r"'a/x\.png' is not a regular file"),
        (("a/x.png", b"", tarfile.CHRTYPE, ""), r"'a/x\.png' is not a regular file"),
    ],
)  # fmt: skip
def test_members_that_are_no_plain_files_are_named(tmp_path, member, message):
    path = write_tar(tmp_path / "d.tar", *members("a", "b"), member)
    with pytest.raises(DataError, match=message):
        open_test_split(str(path), DataConfig())


def test_a_sparse_member_is_named(tmp_path):
    member = tarfile.TarInfo("a/x.png")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.addfile(member)
    with pytest.raises(DataError, match=r"'a/x\.png' is a sparse file; repack the archive"):
        open_test_split(str(tmp_path / "d.tar"), DataConfig())


def test_archives_one_after_the_other_are_all_read(tmp_path):
    one = write_tar(tmp_path / "1.tar", *members("a", "b")).read_bytes()
    two = write_tar(tmp_path / "2.tar", *members("c", first=1)).read_bytes()
    (tmp_path / "d.tar").write_bytes(one + two + one)
    part = open_test_split(str(tmp_path / "d.tar"), DataConfig())
    assert part.class_names == ("a", "b", "c")
    assert len(part) == 18
    assert [part[i][0].getpixel((0, 0))[0] for i in (0, 12, 13)] == [0, 1, 11]


def test_an_archive_that_is_cut_off_is_refused_wherever_it_ends(tmp_path):
    whole = write_tar(tmp_path / "d.tar", *members("a", "b", count=2), end=False).read_bytes()
    for size in range(1, len(whole) + 1, 256):
        (tmp_path / "d.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"d\.tar"):
            open_test_split(str(tmp_path / "d.tar"), DataConfig())
    (tmp_path / "d.tar").write_bytes(whole)
    with pytest.raises(DataError, match="no end mark at byte"):
        open_test_split(str(tmp_path / "d.tar"), DataConfig())


def test_one_flipped_byte_never_loses_an_image(tmp_path):
    path = write_tar(tmp_path / "d.tar", *members("a", "b", count=2))
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            part = open_test_split(str(path), DataConfig())
        except DataError:
            refused += 1
            continue
        assert part.class_names == ("a", "b")
        assert len(part) == 4
        for i in range(4):
            with contextlib.suppress(UnreadableImage):  # by name, as test_images.py has it
                part[i]
    assert refused > 50


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\x7f" * 11])
def test_impossible_sizes_are_refused_at_once(tmp_path, size):
    path = write_tar(tmp_path / "d.tar", *members("a", "b"))
    header = bytearray(path.read_bytes())
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path.write_bytes(header)
    with pytest.raises(DataError, match=r"d\.tar"):
        open_test_split(str(path), DataConfig())


def test_too_many_shards_are_refused_by_their_count(tmp_path):
    config = DataConfig(train="wds/x", root=str(tmp_path), train_split="train-{0..99999999999}.tar")
    with pytest.raises(DataError, match="names more than 100,000 shards"):
        open_splits(config)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"splits": 5}', '{"splits": {"train": 3}}', '{"splits": {"train": {"filenames": 3}}}'],
)
def test_a_damaged_list_of_shards_is_named(tmp_path, text):
    (tmp_path / "_info.json").write_text(text)
    with pytest.raises((DataError, ConfigError), match=r"_info\.json'"):
        open_splits(DataConfig(train="wds/x", root=str(tmp_path)))
