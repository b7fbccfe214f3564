"""A fresh process imports what it needs and no more; timm knows our models in either order of imports."""

import subprocess
import sys

import pytest

from localvit.cli import VERBS

SLOW = ("torch", "numpy", "timm", "pydantic", "scipy", "PIL")


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [(), *((verb,) for verb in VERBS), ("study", "run")], ids=" ".join)
def test_help_loads_nothing_slow(words):
    code = f"""
import sys
from localvit.cli import main
assert main({[*words, "--help"]!r}) == 0
assert "localvit" in sys.modules
print("loaded:", [name for name in {SLOW!r} if name in sys.modules])
"""
    assert fresh(code).endswith("loaded: []\n")


LIGHT = [("study", "list"), ("study", "new", "ours"), ("models",), ("models", "localvit_pvt_tiny")]


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_a_verb_that_only_reads_and_writes_text_needs_no_torch(words, tmp_path):
    code = f"""
import os, sys
from localvit.cli import main
os.chdir({str(tmp_path)!r})
assert main({[*words]!r}) == 0
print("loaded:", [name for name in ("torch", "timm", "numpy") if name in sys.modules])
"""
    assert fresh(code).endswith("loaded: []\n")


WRONG = (
    ["train", "--recipe", "digit"],
    ["train", "--data", "digits", "--set", "optim.lrr=1"],
    ["train", "--recipe", "digits"],  # without --output
    ["plan", "--recipe", "digits", "--epochs", "3"],
    ["data", "check", "digits", "--set", "optim.lrr=1"],
    ["demo", "--recipe", "digit"],
    ["study", "run", "nope"],
    ["study", "show", "gate", "--scale", "nope"],
    ["study", "run", "gate", "--set", "optim.lrr=1"],
)


def test_a_wrong_configuration_is_named_without_torch():
    code = f"""
import sys
from localvit.cli import main
assert [main(words) for words in {WRONG!r}] == [2] * {len(WRONG)}
print("loaded:", [name for name in ("torch", "timm", "numpy") if name in sys.modules])
"""
    assert fresh(code) == "loaded: []\n"


def test_importing_the_package_loads_nothing_slow():
    code = f"import sys, localvit; print([name for name in {SLOW!r} if name in sys.modules])"
    assert fresh(code) == "[]\n"


CREATE = "print(sum(p.numel() for p in timm.create_model('localvit_tiny_patch16_224').parameters()))"


@pytest.mark.parametrize(
    "imports",
    [
        "import localvit, timm",
        "import timm, localvit",
        "import localvit; localvit.localize; import timm",
        "from localvit import load_official; import timm",
    ],
)
def test_timm_knows_our_models_in_either_order(imports):
    code = f"""{imports}
assert {{"localized", "pvt_tiny", "t2t_vit_7"}} <= set(timm.list_models())
{CREATE}"""
    assert fresh(code) == "5908696\n"


def test_a_network_with_locality_alone_uses_the_fast_forms():
    code = """
import localvit
from localvit.locality import LocalityFeedForward, grid
from localvit.acceleration.dispatch import accelerated
print(grid._accelerator is accelerated)
"""
    assert fresh(code) == "True\n"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "localvit", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("localvit 0.")
