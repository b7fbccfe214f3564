"""What is shipped: the wheel works outside the checkout, the README's code runs, imports point one way."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import localvit
from localvit.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_in_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_commands_in_the_readme_exist():
    commands = re.findall(r"^\s*localvit (\w+)", README, re.MULTILINE)
    assert commands
    assert set(commands) <= set(VERBS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)`?$", README, re.MULTILINE)) <= targets


def test_files_that_torchscript_reads_keep_their_annotations():
    """Postponed evaluation would turn them to strings, which TorchScript cannot read everywhere."""
    surgery = ("surgery/operation.py", "surgery/drop_path.py")
    baselines = [f"baselines/{name}.py" for name in ("pvt", "pvt_stage", "t2t_vit", "tokens_to_token")]
    for name in ("locality/feed_forward.py", "locality/grid.py", "locality/layers.py", *surgery, *baselines):
        assert "from __future__ import annotations" not in (ROOT / "localvit" / name).read_text()
