"""The order of classes and files is the same in every process and on every file system."""

import json
import os
import subprocess
import sys
from pathlib import Path

from timm.utils.misc import natural_key

from localvit.data.config import DataConfig
from localvit.data.identity import image_name
from localvit.data.order import name_order
from localvit.data.splits import open_splits, open_test_split
from localvit.inference.prediction import find_files

ROOT = Path(__file__).parents[2]
NAMES = ("b", "A", "a", "B", "01", "1", "10", "2", "①", "x²", "٣")
IN_ORDER = ["01", "1", "2", "٣", "10", "A", "a", "B", "b", "x²", "①"]
SHOW = """
import json, sys
from localvit.data import DataConfig, open_test_split
parts = [open_test_split(source, DataConfig()) for source in sys.argv[1:]]
print(json.dumps([[p.class_names, [p.images.reader.filename(i) for i in range(len(p))]] for p in parts]))
"""


def test_names_that_tie_or_hold_odd_digits_have_an_order():
    for names in (NAMES, NAMES[::-1]):
        assert sorted(names, key=name_order) == IN_ORDER


def test_names_that_do_not_tie_are_ordered_as_timm_orders_them():
    names = [f"{stem}{number}" for stem in ("n0", "class ", "Zoo", "é") for number in range(12)]
    assert sorted(names, key=name_order) == sorted(names, key=natural_key)


def test_classes_do_not_depend_on_the_hash_seed(make_folder, make_tar):
    classes = {"b": 2, "A": 2, "a": 2, "B": 2, "01": 2, "1": 2}
    sources = [str(make_folder("d", classes)), str(make_tar("d.tar", classes))]
    shown = []
    for seed in "03":
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SHOW, *sources]
        shown.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True))
    for names, files in json.loads(shown[0].stdout):
        assert names == ["01", "1", "A", "a", "B", "b"]
        assert files == sorted(files, key=name_order)
        assert len(files) == 12
    assert len({one.stdout for one in shown}) == 1


def test_a_name_with_an_odd_digit_is_a_class_and_a_file(make_folder, make_tar):
    classes = {"①": 10, "x²": 10}
    folder = make_folder("d", classes)
    assert open_splits(DataConfig(train=str(folder))).class_names == ("x²", "①")
    assert open_test_split(str(make_tar("d.tar", classes)), DataConfig()).class_names == ("x²", "①")
    assert len(find_files([str(folder)]).files) == 20


def test_folders_are_read_as_timm_reads_them(make_folder, tmp_path):
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    make_folder("set/train", {"c": 2, "b": 2, "a10": 1, "a9": 1})
    make_folder("elsewhere", {"linked": 2})
    (tmp_path / "set" / "train" / "link").symlink_to(tmp_path / "elsewhere" / "linked")
    (tmp_path / "set" / "train" / "b" / "notes.txt").write_text("no image")
    part = open_test_split(str(tmp_path / "set" / "train"), DataConfig())
    timms = ReaderImageFolder(str(tmp_path / "set" / "train"))
    assert [(image_name(part, i), label) for i, label in enumerate(part.labels)] == timms.samples
    assert part.class_names == tuple(timms.class_to_idx) == ("a9", "a10", "b", "c", "link")
