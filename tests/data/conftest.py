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
        value = 0
        with tarfile.open(tmp_path / name, "w") as tar:
            for class_name, count in classes.items():
                for i in range(count):
                    data = io.BytesIO()
                    plain_image(value % 256).save(data, "PNG")
                    member = tarfile.TarInfo(f"{class_name}/{i}.png")
                    member.size = data.tell()
                    data.seek(0)
                    tar.addfile(member, data)
                    value += 1
        return tmp_path / name

    return make
