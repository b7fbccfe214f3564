"""The wheel works outside the checkout; imports point one way."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import localvit

ROOT = Path(__file__).parents[1]


def test_a_wheel_is_built_and_works_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(site)
    assert {"localvit/py.typed", "localvit/config/recipes/digits.yaml"} <= set(names)
    assert not any(name.startswith(("tests/", "docs/")) for name in names)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import localvit, timm;"
        "print(localvit.__file__, localvit.__version__);"
        "timm.create_model('localvit_tiny_patch16_224', depth=1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    path, version = run.stdout.split()
    assert Path(path).is_relative_to(site)
    assert version == localvit.__version__


def test_files_that_torchscript_reads_keep_their_annotations():
    """Postponed evaluation would turn them to strings, which TorchScript cannot read everywhere."""
    surgery = ("surgery/operation.py", "surgery/drop_path.py")
    baselines = [f"baselines/{name}.py" for name in ("pvt", "pvt_stage", "t2t_vit", "tokens_to_token")]
    for name in ("locality/feed_forward.py", "locality/grid.py", "locality/layers.py", *surgery, *baselines):
        assert "from __future__ import annotations" not in (ROOT / "localvit" / name).read_text()


def doors():
    return [path for path in (ROOT / "localvit").rglob("__init__.py") if "door(__name__)" in path.read_text()]


@pytest.mark.parametrize("path", doors(), ids=lambda path: path.parent.name)
def test_a_door_opens_to_every_name_and_hides_no_module(path):
    """Importing a submodule sets its name on the package, so a function of that name would be lost."""
    room = importlib.import_module(".".join(path.relative_to(ROOT).parent.parts))
    assert all(getattr(room, name) is not None for name in room.__all__)
    modules = {file.stem for file in path.parent.iterdir()}
    assert not modules & set(room.__all__)
    shown = {name for name in dir(room) if not name.startswith("__")}
    assert shown - modules - {folder.name for folder in path.parent.iterdir()} == {
        name for name in room.__all__ if not name.startswith("__")
    }
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'"):
        room.nothing  # noqa: B018


def test_the_linter_sees_a_forbidden_import(tmp_path):
    """In a copy of the package, an import from a room above is refused, and one from behind a door."""
    shutil.copytree(ROOT / "localvit", tmp_path / "localvit")
    shutil.copy(ROOT / ".importlinter", tmp_path)
    linter = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    planted = {
        "": "0 broken",
        "from localvit.cli import main as main\n": "localvit.training is not allowed to import localvit.cli",
        "from localvit.data.order import name_order as name_order\n": "The door of data BROKEN",
    }
    place = tmp_path / "localvit" / "training" / "task.py"
    for line, told in planted.items():
        shutil.copy(ROOT / "localvit" / "training" / "task.py", place)
        with open(place, "a") as file:
            file.write(line)
        done = subprocess.run(
            linter, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert told in " ".join(done.stdout.split()), done.stdout
        assert (done.returncode == 0) == (line == "")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "localvit":
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}")
