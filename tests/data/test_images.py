import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from torch.utils.data import DataLoader

from localvit.data import DataConfig, DataError, Part, UnreadableImage, open_reported, open_splits
from localvit.data.sources import find_splits
from localvit.data.tar import open_tar
from tests.data.conftest import picture


def gray(sample):
    image, label = sample
    return np.asarray(image.convert("RGB"))[0, 0, 0].item(), label


def test_tar_is_right_in_forked_workers_after_a_peek_in_the_parent(make_tar):
    path = make_tar("pictures.tar", {"a": 100, "b": 100})
    images = open_reported(str(path), DataConfig())
    assert gray(images[0]) == (0, 0)  # the peek that breaks a reader with a shared file position
    loader = DataLoader(images, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [gray(sample) for sample in loader] == [(i, i // 100) for i in range(200)]


def test_folder_and_tar_agree(make_folder, make_tar):
    classes = {"class10": 3, "class9": 2}
    folder = open_reported(str(make_folder("pictures", classes)), DataConfig())
    tar = open_reported(str(make_tar("pictures.tar", classes)), DataConfig())
    assert folder.class_names == tar.class_names == ("class9", "class10")  # natural order
    assert [gray(s) for s in folder] == [gray(s) for s in tar] == [(3, 0), (4, 0), (0, 1), (1, 1), (2, 1)]


def test_unreadable_image_is_named(make_folder):
    folder = make_folder("pictures", {"a": 2, "b": 2})
    bad = folder / "a" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    images = open_reported(str(folder), DataConfig())
    with pytest.raises(UnreadableImage, match=str(bad)):
        images[1]


def test_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("x.png", "broken")))
    assert (error.name, error.reason) == ("x.png", "broken")


def test_tar_without_pictures_or_compressed_is_refused(tmp_path, make_tar):
    with pytest.raises(DataError, match="holds no pictures"):
        open_tar(str(make_tar("empty.tar", {})))
    (tmp_path / "not.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="not an uncompressed tar"):
        open_tar(str(tmp_path / "not.tar"))


def test_labels_follow_the_given_classes(make_folder):
    folder = make_folder("pictures", {"b": 1, "c": 1})
    images = open_reported(str(folder), DataConfig(), class_names=("a", "b", "c"))
    assert [label for _, label in images] == [1, 2]
    with pytest.raises(DataError, match="class 'c' is not among"):
        open_reported(str(folder), DataConfig(), class_names=("a", "b"))


def test_torchvision_data_set_through_timm(tmp_path):
    # CIFAR-10 as torchvision lays it out, with two pictures a file; its own integrity check is by checksum.
    from torchvision.datasets import FakeData

    from localvit.data.images import TorchvisionImages

    dataset = FakeData(size=6, image_size=(3, 4, 4), num_classes=3)
    dataset.targets = [0, 1, 2, 0, 1, 2]
    images = TorchvisionImages(dataset, "torch/fake")
    assert images.class_names == ("0", "1", "2")
    assert images[4][1] == 1
    assert len(Part(images, np.arange(6), images.class_names)) == 6


def test_torch_source_needs_a_root_and_says_how_to_download(tmp_path):
    with pytest.raises(DataError, match=r"data\.root"):
        find_splits("torch/cifar10", DataConfig())["train"]()
    with pytest.raises(DataError, match=r"data\.download=true"):
        find_splits("torch/cifar10", DataConfig(root=str(tmp_path)))["train"]()
    assert list(tmp_path.iterdir()) == []


def test_unknown_source_names_what_is_accepted():
    with pytest.raises(DataError, match=r"'nowhere'; accepted: 'digits', an image folder"):
        find_splits("nowhere", DataConfig())


@pytest.fixture
def shards(tmp_path):
    """Two shards of five pictures for training, one for validation; the class is the parity."""
    for name, values in (("train-0", range(5)), ("train-1", range(5, 10)), ("val-0", range(10, 14))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for value in values:
                data = io.BytesIO()
                picture(value).save(data, "PNG")
                for suffix, content in (("png", data.getvalue()), ("cls", str(value % 2).encode())):
                    member = tarfile.TarInfo(f"{value:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


def test_webdataset_shards_are_read_by_index(shards):
    config = DataConfig(
        train="wds/pictures", root=str(shards), train_split="train-{0..1}.tar|10", test_split="val-0.tar"
    )
    splits = open_splits(config)
    assert sorted(gray(s) for part in (splits.train, splits.validation) for s in part) == [
        (i, i % 2) for i in range(10)
    ]
    assert [gray(s) for s in splits.test] == [(i, i % 2) for i in range(10, 14)]


def test_webdataset_splits_by_name(shards):
    info = {"splits": {"train": {"filenames": ["train-0.tar"]}, "validation": {"filenames": ["val-0.tar"]}}}
    (shards / "_info.json").write_text(json.dumps(info))
    splits = open_splits(DataConfig(train="wds/pictures", root=str(shards)))
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (5, 4)
    with pytest.raises(DataError, match="has the splits train, validation, not 'dev'"):
        open_splits(DataConfig(train="wds/pictures", root=str(shards), test_split="dev"))


def test_webdataset_errors(shards, make_tar):
    with pytest.raises(DataError, match=r"data\.root=None"):
        open_splits(DataConfig(train="wds/pictures"))
    with pytest.raises(DataError, match="name shards"):
        open_splits(DataConfig(train="wds/pictures", root=str(shards)))
    with pytest.raises(DataError, match=r"train-2\.tar"):
        open_splits(DataConfig(train="wds/pictures", root=str(shards), train_split="train-{0..2}.tar"))
    make_tar("train-3.tar", {"a": 1})
    with pytest.raises(DataError, match=r"'a/0\.png' in .* has no \.cls file"):
        open_splits(DataConfig(train="wds/pictures", root=str(shards), train_split="train-3.tar"))
