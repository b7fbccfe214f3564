"""Small image folders and tars, made on the spot."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def plain_image(value: int, side: int = 4) -> Image.Image:
    """An image of one colour, so that its identity can be read off any pixel."""
    return Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8))


def png(value: int, form: str = "PNG") -> bytes:
    """Such an image as a file."""
    data = io.BytesIO()
    plain_image(value, side=16).save(data, form)
    return data.getvalue()


def write_tar(path: Path, *members: tuple, end: bool = True) -> Path:
    """Write a tar of (name, content) or (name, content, type, link) members, with or without its end mark."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, *kind in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if kind:
                member.type, member.linkname = kind
            tar.addfile(member, io.BytesIO(content))
        used = tar.offset
    if not end:
        path.write_bytes(path.read_bytes()[:used])
    return path


@pytest.fixture
def make_folder(tmp_path):
    """Make FOLDER/class_name/NN.png with consecutive gray values."""

    def make(name: str, classes: dict[str, int]) -> Path:
        value = 0
        for class_name, count in classes.items():
            (tmp_path / name / class_name).mkdir(parents=True)
            for i in range(count):
                plain_image(value % 256).save(tmp_path / name / class_name / f"{i}.png")
                value += 1
        return tmp_path / name

    return make


@pytest.fixture
def make_tar(tmp_path):
    """Make a tar of class_name/NN.png with consecutive gray values."""

    def make(name: str, classes: dict[str, int]) -> Path:
        names = [f"{class_name}/{i}.png" for class_name, count in classes.items() for i in range(count)]
        return write_tar(tmp_path / name, *((each, png(value % 256)) for value, each in enumerate(names)))

    return make
